import inspect
import re
from functools import partial
from typing import ClassVar

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from flyp_plugin.heads import ImageClassifier, build_zeroshot_head
from flyp_plugin.learned import ClassHead, exact_logits
from flyp_plugin.precision import allows_tf32, full_float32, match_open_clip_precision
from flyp_plugin.prompts import ClassPrompts, fill
from tests.close import assert_close
from tests.helpers_eval import NAMES, TEMPLATES, checkpoint, digits, root

MODEL = "tiny-digits"
PROMPTS = ClassPrompts(NAMES, TEMPLATES)


@pytest.fixture(scope="module")
def model():
    root()
    return open_clip.create_model(MODEL, pretrained=str(checkpoint(MODEL, 80))).eval()


@pytest.fixture(scope="module")
def images():
    preprocess = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    return torch.stack([preprocess(image) for image in digits()[0][1000:1040]])


def test_head_is_open_clips(model):
    tokenizer = open_clip.get_tokenizer(MODEL)
    templates = [partial(fill, template) for template in TEMPLATES]
    theirs = open_clip.build_zero_shot_classifier(model, tokenizer, NAMES, templates)
    head = build_zeroshot_head(model, tokenizer, PROMPTS)
    assert head.shape == (48, 10)
    assert_close(head, theirs)
    assert_close(head.norm(dim=0), torch.ones(10))


def test_logits_are_scaled_cosines(model, images):
    classifier = ImageClassifier.from_prompts(model, open_clip.get_tokenizer(MODEL), PROMPTS)
    with torch.no_grad():
        features = torch.nn.functional.normalize(model.encode_image(images), dim=-1)
        expected = model.logit_scale.exp() * features @ classifier.head
        assert_close(classifier(images), expected)


def test_predict_gives_names_and_probabilities(images):
    classifier = ImageClassifier.from_checkpoint(MODEL, checkpoint(MODEL, 80), PROMPTS)
    pictures = digits()[0][1000:1040]
    predictions = classifier.predict(pictures)
    assert predictions == classifier.predict(images) == classifier.predict(images.clone())
    with torch.no_grad():
        probabilities = classifier(images).softmax(1)
    assert [name for name, _ in predictions] == [NAMES[i] for i in probabilities.argmax(1)]
    assert [p for _, p in predictions] == probabilities.amax(1).tolist()


def test_predict_takes_16_bits_as_training_does():
    classifier = ImageClassifier.from_checkpoint(MODEL, checkpoint(MODEL, 80), PROMPTS)
    pictures = [np.asarray(picture.convert("L")) for picture in digits()[0][1000:1020]]
    deep = [Image.fromarray(picture.astype(np.uint16) * 256 + 7) for picture in pictures]
    assert classifier.predict(deep) == classifier.predict([Image.fromarray(picture) for picture in pictures])


@pytest.mark.parametrize("precision", ["amp_bf16", "bf16", "pure_bf16"])
def test_low_precision_is_near_full(precision, images):
    full = ImageClassifier.from_checkpoint(MODEL, checkpoint(MODEL, 80), PROMPTS)
    low = ImageClassifier.from_checkpoint(MODEL, checkpoint(MODEL, 80), PROMPTS, precision=precision)
    with torch.no_grad():
        logits = low(images)
        assert logits.dtype == torch.float32
        assert 0 < (logits - full(images)).abs().max() < 0.05 * full(images).abs().max()


def test_a_head_of_other_classes_is_refused(model):
    with pytest.raises(ValueError, match=r"\(48, 9\).*\b10\b"):
        ImageClassifier(model, torch.zeros(48, 9), NAMES)


def test_wrapping_leaves_the_models_mode(model):
    head = torch.zeros(48, 10)
    for mode in (True, False):
        classifier = ImageClassifier(model.train(mode), head, NAMES)
        assert classifier.training == model.training == mode


def test_the_head_is_part_of_the_state_dict(model):
    assert "head" in ImageClassifier(model, torch.zeros(48, 10), NAMES).state_dict()


# TF32, whose settings are there without a GPU


MATMUL = torch.backends.cuda.matmul
IN_TWO_WAYS = pytest.mark.parametrize(
    "name", ["allow_tf32", pytest.param("fp32_precision", marks=pytest.mark.skipif(
        not hasattr(MATMUL, "fp32_precision"), reason="came with torch 2.9"))]
)  # fmt: skip


@pytest.fixture(autouse=True)
def _settings_put_back():
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    yield
    cudnn.benchmark, cudnn.deterministic = before
    MATMUL.allow_tf32 = False


@IN_TWO_WAYS
def test_full_float32_is_off_afterwards_and_after_an_error(name):
    setattr(MATMUL, name, {"allow_tf32": True, "fp32_precision": "tf32"}[name])
    with pytest.raises(KeyboardInterrupt), full_float32():
        assert not allows_tf32() and not MATMUL.allow_tf32  # which raises where old and new name do not agree
        with full_float32():
            assert not allows_tf32()
        assert not allows_tf32()
        raise KeyboardInterrupt
    assert allows_tf32()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_full_float32_leaves_torchs_own_precision(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        with full_float32():
            assert not allows_tf32()
        assert allows_tf32() and torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, and notes what its products are run with."""

    is_cuda = True
    products: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in ("matmul", "__matmul__"):
            cls.products.append("tf32" if allows_tf32() else "float32")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_logits_on_a_gpu_are_float32_products():
    MATMUL.allow_tf32 = True
    OnGpu.products.clear()
    features, weight = torch.randn(4, 48), torch.randn(10, 48)
    logits = exact_logits(features.as_subclass(OnGpu), weight)
    assert OnGpu.products == ["float32"] and allows_tf32()
    assert torch.equal(logits.as_subclass(torch.Tensor), features @ weight.T)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_exact_logits_compile(fullgraph):
    head = ClassHead(
        torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), ClassPrompts(list("abc"), ["{c}"])
    )
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), head)
    features = torch.randn(5, 8)
    torch._dynamo.reset()
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=fullgraph)):
        model.zero_grad()
        logits = run(features)
        logits.sum().backward()
        if run is model:
            expected, gradient = logits.detach(), head.weight.grad.clone()
    assert_close(logits.detach(), expected)
    assert_close(head.weight.grad, gradient)
    torch._dynamo.reset()


def test_a_gpu_computes_as_in_open_clips_main(monkeypatch):
    from open_clip_train import main

    theirs = re.findall(r"torch\.backends\.([\w.]+) = (True|False)", inspect.getsource(main))
    assert len(theirs) == 3

    def setting(path):
        return eval(f"torch.backends.{path}", {"torch": torch})

    for path, value in theirs:
        module, _, name = path.rpartition(".")
        setattr(eval(f"torch.backends.{module}", {"torch": torch}), name, value != "True")
    match_open_clip_precision()  # on a CPU, nothing
    assert all(setting(path) != (value == "True") for path, value in theirs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    match_open_clip_precision()
    assert all(setting(path) == (value == "True") for path, value in theirs)
