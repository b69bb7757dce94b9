import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2

from flyp_plugin.heads import ImageClassifier, build_zeroshot_head
from flyp_plugin.prompts import ClassPrompts
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
    theirs = open_clip.build_zero_shot_classifier(model, tokenizer, NAMES, PROMPTS.template_functions())
    for per_batch in (10, 3, None):
        head = build_zeroshot_head(model, tokenizer, PROMPTS, num_classes_per_batch=per_batch)
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


@pytest.mark.parametrize("precision", ["amp_bf16", "bf16", "pure_bf16"])
def test_low_precision_is_near_full(precision, images):
    full = ImageClassifier.from_checkpoint(MODEL, checkpoint(MODEL, 80), PROMPTS)
    low = ImageClassifier.from_checkpoint(MODEL, checkpoint(MODEL, 80), PROMPTS, precision=precision)
    with torch.no_grad():
        logits = low(images)
        assert logits.dtype == torch.float32
        assert 0 < (logits - full(images)).abs().max() < 0.05 * full(images).abs().max()


def test_a_head_of_other_classes_is_refused(model):
    with pytest.raises(ValueError, match="does not fit 10 class names"):
        ImageClassifier(model, torch.zeros(48, 9), NAMES)


def test_wrapping_leaves_the_models_mode(model):
    head = torch.zeros(48, 10)
    for mode in (True, False):
        classifier = ImageClassifier(model.train(mode), head, NAMES)
        assert classifier.training == model.training == mode


def test_the_head_is_part_of_the_state_dict(model):
    assert "head" in ImageClassifier(model, torch.zeros(48, 10), NAMES).state_dict()
