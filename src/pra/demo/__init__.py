"""The web demo (extra ``demo``): what a trained model does, in a browser.

What is asked for and generated (:mod:`.generation`), what is uploaded (:mod:`.upload`), what a model is
(:mod:`.about`) and how that looks (:mod:`.markup`) know no web framework; :mod:`.page` puts them on a Gradio page,
and :mod:`.command` serves it.
"""
