"""PRAPipeline: the call that users of diffusers know."""

import dataclasses
import importlib
import importlib.util
import inspect
import sys
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from support.files import contents
from support.hub import TOKEN, Repository
from support.models import PIXEL, random_model
from support.refusal import refused

import pra
from pra.sampling import Engine
from pra.utils.extras import install_command


@pytest.fixture(scope="module")
def pipeline_class(request):
    pytest.importorskip("diffusers", reason="needs pip install 'pra-pixels[diffusers]'")
    if importlib.util.find_spec("torchvision") is not None:  # diffusers imports it where it is
        request.getfixturevalue("torchvision_shim")
    from pra.sharing.pipeline import PRAPipeline

    return PRAPipeline


@pytest.fixture
def pipe(pipeline_class):
    model = random_model()
    model.classes = ("ant", "bee", "cat", "dog", "eel")
    return pipeline_class(model)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def drawn(pipe, labels=1, **options):
    return pipe(labels, **{"generator": seeded(1), "output_type": "pt", **options}).images


def test_generator_decides_the_images_of_each_output_type(pipe):
    one, generator = drawn(pipe, [1, 2], generator=seeded(3)), seeded(3)
    assert torch.equal(drawn(pipe, [1, 2], generator=generator), one)
    assert not torch.equal(drawn(pipe, [1, 2], generator=generator), one)
    each = drawn(pipe, [1, 2], generator=[seeded(3), seeded(4)])
    torch.testing.assert_close(each[1:], drawn(pipe, [2], generator=[seeded(4)]))
    global_state = []
    for _ in range(2):
        torch.manual_seed(1)
        global_state.append(drawn(pipe, generator=None))
    assert torch.equal(*global_state)
    pt, array, pictures = (pipe([0, 1], generator=seeded(1), output_type=t).images for t in ("pt", "np", "pil"))
    assert pt.shape == (2, 3, 6, 8)
    assert 0 <= pt.min() < pt.max() <= 1
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert [type(picture) for picture in pictures] == [Image.Image] * 2
    np.testing.assert_array_equal(np.asarray(pictures[1]), (array[1] * 255).round().astype(np.uint8))
    (first,) = pipe([0, 1], generator=seeded(1), output_type="pt", return_dict=False)
    assert torch.equal(first, pt)


def test_settings_default_to_the_model_s(pipe):
    sampling = pipe.model.sampling
    same = drawn(pipe, guidance_scale=sampling.guidance, num_inference_steps=sampling.steps)
    assert torch.equal(drawn(pipe), same)
    assert not torch.equal(drawn(pipe, guidance_scale=3.0), same)
    assert not torch.equal(drawn(pipe, num_inference_steps=1), same)
    seed = int(torch.randint(2**63 - 1, (1,), generator=seeded(1)))
    torch.testing.assert_close(same, pra.Sampler(pipe.model).sample([1], [seed]) / 2 + 0.5)
    plain = drawn(pipe, num_inference_steps=2)
    pipe.model.sampling = dataclasses.replace(sampling, steps=3, times=(0.0, 0.1, 0.9, 1.0))
    assert torch.equal(drawn(pipe, num_inference_steps=2), plain)  # the grid is of three
    assert not torch.equal(drawn(pipe, num_inference_steps=3), same)


def test_labels_are_numbers_names_or_none(pipe):
    one, two = drawn(pipe, 3), drawn(pipe, [3, 4])
    for same in (np.int64(3), torch.tensor(3), (np.int64(3),), "dog", ["dog"]):
        assert torch.equal(drawn(pipe, same), one)
    for same in (np.array([3, 4]), torch.tensor([3, 4])):
        assert torch.equal(drawn(pipe, same), two)
    assert torch.equal(drawn(pipe, None), drawn(pipe, pipe.model.condition.null))
    assert pipe.get_label_ids(["cat", "ant"]) == [2, 0]
    assert pipe.get_label_ids("eel") == [4]


def test_engine_is_made_once_per_settings(pipe, monkeypatch):
    made = []

    def counted(*arguments):
        engine = Engine(*arguments)
        made.append((arguments[1].guidance, weakref.ref(engine)))
        return engine

    monkeypatch.setattr("pra.sampling.sampler.Engine", counted)
    for guidance in (2.0, 1.5, 2.0, 1.5, 3.0, 2.0):  # the third has taken the first one's place
        drawn(pipe, [1, 2], guidance_scale=guidance)
    assert [guidance for guidance, _ in made] == [2.0, 1.5, 3.0, 2.0]
    assert pipe.to("cpu") is pipe
    assert [engine() for _, engine in made] == [None] * 4  # their memory was asked back
    pipe.model = random_model(PIXEL)
    assert torch.equal(drawn(pipe), drawn(pipe))
    assert [guidance for guidance, _ in made[4:]] == [pipe.model.sampling.guidance]


def test_bad_input_is_refused(pipe, monkeypatch):
    for labels, problem in (([9], "label 9 is out of range"), ([1.0], "got [1."), ("cta", "no class 'cta'")):
        refused(lambda labels=labels: pipe(labels), problem)
    refused(lambda: pipe([1, 2], generator=[seeded(1)]), "1 generators for 2 labels")
    refused(lambda: pipe([1], output_type="latent"), "'latent'", "np, pil, pt")
    refused(lambda: pipe([1], num_inference_steps=0), "steps")
    refused(lambda: pipe.get_label_ids(["cta"]), "no class 'cta'; did you mean 'cat'?")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "pra.sharing.pipeline")
    command = install_command("diffusers")
    refused(lambda: importlib.import_module("pra.sharing.pipeline"), command, code="not-installed")


def test_pipeline_is_one_of_diffusers_and_loads_the_same(pipe, pipeline_class, tmp_path):
    import diffusers

    ours, theirs = (list(inspect.signature(one.__call__).parameters) for one in (type(pipe), diffusers.DiTPipeline))
    assert ours == [*theirs, "prompt"]
    assert isinstance(pipe, diffusers.DiffusionPipeline)
    assert (pipe.components, pipe.device) == ({"model": pipe.model}, torch.device("cpu"))
    assert isinstance(pipe(0), diffusers.ImagePipelineOutput)
    pipe.save_pretrained(tmp_path / "model")
    again = pipeline_class.from_pretrained(tmp_path / "model")
    for model in (again.model, pra.load(tmp_path / "model")):
        assert model.classes == pipe.model.classes
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, pipe.model.state_dict()[name])
    refused(lambda: pipe.save_pretrained(tmp_path / "model"), "exists already")
    pipe.to(torch.bfloat16)
    refused(lambda: pipe(0), code="unsupported", value=torch.bfloat16)

    def load(**options):
        return pipeline_class.from_pretrained(tmp_path / "model", **options)

    assert load(torch_dtype=torch.float32, use_safetensors=True, token=None).model.config == pipe.model.config
    refused(lambda: load(torch_dtype=torch.float16), "float32", name="torch_dtype", value=torch.float16)
    refused(lambda: load(use_safetensors=False), "safetensors", name="use_safetensors", value=False)
    refused(lambda: load(cache_folder="x"), "did you mean 'cache_dir'?", name="cache_folder")


def test_from_pretrained_takes_hub_names(pipeline_class, hub, tmp_path):
    pra.save(random_model(PIXEL), tmp_path / "model")
    repository = hub.repositories["bob/model"] = Repository()
    commit = repository.commit(contents(tmp_path / "model"))
    load, other = pipeline_class.from_pretrained, {"cache_dir": tmp_path / "other"}
    for name, revision in (("bob/model", None), ("hub:bob/model", commit)):
        assert load(name, revision=revision).model.config == PIXEL
    refused(lambda: load("bob/none"), "hub:bob/none", code="unreachable")
    refused(lambda: load("bob/model", local_files_only=True, **other), "in the cache", code="unreachable")
    repository.private = True
    refused(lambda: load("bob/model", **other), "bob/model", "private")
    load("bob/model", token=TOKEN, **other)
    load("bob/model", local_files_only=True, **other)
