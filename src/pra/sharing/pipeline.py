"""A pipeline for users of diffusers. Needs the extra ``diffusers``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pra.errors import PraError, nearest
from pra.models import Model, weights
from pra.models.condition import Labels, Texts
from pra.sampling import Samplers
from pra.sampling.requests import changed_sampling
from pra.utils.extras import import_failed
from pra.utils.hub import PREFIX, download, is_address
from pra.utils.pixels import to_pil

try:
    from diffusers import DiffusionPipeline, ImagePipelineOutput
except (ImportError, OSError, RuntimeError) as error:
    raise PraError(import_failed("PRAPipeline", "diffusers", "diffusers", error), code="not-installed") from None

OUTPUTS = ("np", "pil", "pt")
PLACE = ("cache_dir", "token", "local_files_only")
DONE_ANYWAY = {"torch_dtype": torch.float32, "dtype": torch.float32, "use_safetensors": True}
"""Options of diffusers that are accepted with these values, which change nothing."""


class PRAPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Generates images by class or caption, with any model of pra and the call of diffusers' ``DiTPipeline``.

    ``to("cuda")`` moves it. Weights stay float32; on GPUs that have bfloat16 the arithmetic uses that.
    Its files are pra's own (:mod:`pra.models.weights`), not those of diffusers.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.register_modules(model=model)
        self._samplers = Samplers(model)

    def to(self, *args: Any, **kwargs: Any) -> PRAPipeline:
        """Move the pipeline, as diffusers does, and free what sampling keeps on the old device."""
        moved: PRAPipeline = super().to(*args, **kwargs)
        self._samplers = Samplers(self.model)
        return moved

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, revision: str | None = None, **options: Any
    ) -> PRAPipeline:
        """Load a run, a model folder, ``user/model`` on the Hub, or ``hub:user/model``.

        Args:
            pretrained_model_name_or_path: where the model is; a folder that exists comes before the Hub.
            revision: on the Hub: a branch, tag or commit; by default the newest.
            options: ``cache_dir``, ``token`` and ``local_files_only`` of :func:`pra.utils.hub.download`, and others of
                diffusers with the values of :data:`DONE_ANYWAY`.

        Raises:
            PraError: as :func:`pra.load`, or another option.
        """
        place = {name: options.pop(name) for name in PLACE if name in options}
        for name, value in options.items():
            known = nearest(name, ("revision", *PLACE, *DONE_ANYWAY))
            advice = ". Weights are float32 safetensors" if name in DONE_ANYWAY else known
            if name not in DONE_ANYWAY or value not in (None, DONE_ANYWAY[name]):
                problem = f"PRAPipeline.from_pretrained takes no {name}={value}{advice}"
                raise PraError(problem, code="unsupported", name=name, value=value)
        path = str(pretrained_model_name_or_path)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path, re.ASCII) and not Path(path).exists():
            path = PREFIX + path
        path = f"{path}@{revision}" if revision else path
        return cls(weights.load(download(path, **place) if is_address(path) else path))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write a new model folder, for :meth:`from_pretrained` and :func:`pra.load`, as :func:`pra.save`."""
        weights.save(self.model, save_directory)

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Return the numbers of classes by their names. Raise :class:`PraError` where no class has such a name."""
        rows = self.model.condition.parse(label, self.model.classes)
        numbers: list[int] = rows.view(len(rows), -1)[:, 0].tolist()
        return numbers

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        prompt: Texts | None = None,
    ) -> Any:
        """Generate one image per class label, prompt, or pair of them.

        Args:
            class_labels: classes by number or name, one or several; without, one image of no class.
            guidance_scale: 1 is off; by default the model's recommendation.
            generator: decides the images, in the same state the same; one per image, or one from which the seeds of all
                are drawn in order. By default torch's global one.
            num_inference_steps: solver intervals per patch (JiT: per image); by default the model's recommendation.
            output_type: "pil", "np" (``(B, H, W, C)``, float32 in [0, 1]) or "pt" (``(B, C, H, W)``, the same).
            return_dict: an ``ImagePipelineOutput`` with ``images``; else a tuple of them.
            prompt: captions, one or several, for models that read captions.

        Raises:
            PraError: bad input, another number of generators than of labels, or weights that are not float32.
        """
        if self.model.dtype != torch.float32:
            problem = f"the weights are {self.model.dtype}. Use to(torch.float32)"
            raise PraError(problem, code="unsupported", value=self.model.dtype)
        if output_type not in OUTPUTS:
            problem = f"output_type {output_type!r} is unknown{nearest(str(output_type), OUTPUTS)}"
            raise PraError(problem, code="unknown", value=output_type)
        condition = self.model.condition
        asked = condition.null if class_labels is None and prompt is None else class_labels
        labels = condition.parse(asked, self.model.classes, prompt)
        given = {"guidance": guidance_scale, "steps": num_inference_steps}
        changes = {name: value for name, value in given.items() if value is not None}
        if self._samplers.model is not self.model:  # another was registered
            self._samplers = Samplers(self.model)
        sampler = self._samplers.of(changed_sampling(self.model.sampling, changes))
        images = sampler.sample(labels, _seeds(generator, len(labels)))
        shown: Any = images / 2 + 0.5
        if output_type == "pil":
            shown = [to_pil(image) for image in images]
        elif output_type == "np":
            shown = shown.permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=shown) if return_dict else (shown,)


def _seeds(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[int]:
    """Draw a seed an image, which advances the generators."""
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        seeds: list[int] = torch.randint(2**63 - 1, (count,), generator=generator, device=device).tolist()
        return seeds
    if len(generator) != count:
        raise PraError(f"{len(generator)} generators for {count} labels. Give one, or one each", code="mismatch")
    return [seed for one in generator for seed in _seeds(one, 1)]
