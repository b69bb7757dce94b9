"""Each objective against an independent implementation, in open_clip's own loop; and what reads a learned head."""

import json
import re

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import cross_entropy, normalize

from flyp_plugin import ClassPromptDataset, ClassPrompts, ImageClassifier, flags, objectives, openclip
from flyp_plugin.commands import call as flyp
from flyp_plugin.data import MAX_LOST, LabelledDataset
from flyp_plugin.errors import InputError
from flyp_plugin.heads import val_preprocess
from flyp_plugin.learned import LP_C, find_class_rows, fit_head, load_head
from flyp_plugin.objectives import PairLoss
from flyp_plugin.record import teacher_path
from flyp_plugin.sources import expand_source
from flyp_plugin.train import train
from tests.close import (
    FORWARD,
    assert_close,
    assert_moved_alike,
    assert_same_choices,
    assert_same_figures,
)
from tests.digits import NAMES, TEMPLATES
from tests.faults import ranks
from tests.helpers_eval import digits as digit_images
from tests.helpers_eval import write_set
from tests.naming import naming, says
from tests.test_train import assert_equal, params, results, run_of, tensorboard_losses, weights

MODEL = "digits-vit"
TEMPLATE = "a photo of the number {c}."  # one, for flyp-ce draws among several
# steps proportional to the gradient, and long against the rounding of a weight
SGD = [
    "--templates",
    TEMPLATE,
    "--opt",
    "timm/sgd",
    "--lr",
    0.1,
    "--wd",
    0,
    "--warmup",
    0,
    "--lr-scheduler",
    "const",
]
needs_sgd = pytest.mark.skipif(
    not hasattr(openclip.parse_args([]), "opt"), reason="this open_clip has no --opt (before 2.30)"
)


@pytest.fixture(scope="module")
def launch(digits, tmp_path_factory):
    """Train on the digits; later flags win. Returns the run's folder."""
    logs = tmp_path_factory.mktemp("logs")

    def launch(*flags, name):
        argv = ["--model", MODEL, "--model-config", f"{digits}/{MODEL}.json", "--train-data", digits]
        argv += ["--logs", logs, "--name", name, "--device", "cpu", "--workers", 0, "--lr", "1e-3"]
        argv += ["--batch-size", 100, "--epochs", 1, "--train-num-samples", 200]
        assert train([str(word) for word in [*argv, "--log-every-n-steps", 1, *flags]]) == 0
        return logs / name

    return launch


@pytest.fixture(scope="module")
def start(launch):
    """Weights that know a little of digits."""
    return (
        launch("--epochs", 4, "--train-num-samples", 1000, "--warmup", 8, "--lr", "3e-3", name="start")
        / "checkpoints/epoch_4.pt"
    )


@pytest.fixture(scope="module")
def tuned(launch, start, digits):
    """A finished ce run of two epochs, evaluated."""
    flags = ["--pretrained", start, "--eval-data", f"val={digits}"]
    return launch("--objective", "ce", "--epochs", 2, *flags, name="tuned")


@pytest.fixture(scope="module")
def probed(launch, start, digits):
    flags = ["--pretrained", start, "--eval-data", f"val={digits}"]
    return launch("--objective", "lp", "--epochs", 7, *flags, name="probed")


def loaded(path):
    return open_clip.create_model(MODEL, pretrained=str(path), output_dict=True)


def prompts(*templates):
    return ClassPrompts(NAMES, templates or TEMPLATES)


def text_head(model, templates=TEMPLATES):
    functions = [lambda name, t=t: t.replace("{c}", name) for t in templates]
    return open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer(MODEL), NAMES, functions)


# The losses


def pairs(number=12, classes=4, seed=0):
    random = torch.Generator().manual_seed(seed)
    images, texts = (
        normalize(torch.randn(number, 8, generator=random, dtype=torch.float64)) for _ in range(2)
    )
    labels = torch.randint(classes, (number,), generator=random)
    return images.requires_grad_(), texts.requires_grad_(), torch.tensor(7.0, dtype=torch.float64), labels


def plain_collisions(images, texts, scale, labels, how):
    """The sums, one row at a time."""
    total = 0
    for a, b in ((images, texts), (texts, images)):
        for i in range(len(labels)):
            logits = [scale * (a[i] @ b[j]) for j in range(len(labels))]
            mates = [j for j in range(len(labels)) if labels[j] == labels[i]]
            kept = [j for j in range(len(labels)) if j == i or how != "mask" or j not in mates]
            positives = mates if how == "soft" else [i]
            normaliser = torch.stack([logits[j] for j in kept]).logsumexp(0)
            total += sum(normaliser - logits[j] for j in positives) / len(positives)
    return total / (2 * len(labels))


def plain_class_term(images, texts, scale, labels):
    seen = sorted(set(labels.tolist()))
    head = torch.stack([normalize(texts[labels == c].mean(0), dim=0) for c in seen])
    return sum(
        cross_entropy(scale * head @ f, torch.tensor(seen.index(int(c)))) for f, c in zip(images, labels)
    ) / len(labels)


@pytest.mark.parametrize("how", ["keep", "mask", "soft"])
@pytest.mark.parametrize("weight", [0, 0.7])
def test_pair_loss_is_the_sums(how, weight):
    images, texts, scale, labels = pairs()
    ours = PairLoss(how, weight)(images, texts, scale, labels)
    plain = plain_collisions(images, texts, scale, labels, how)
    plain = plain + weight * plain_class_term(images, texts, scale, labels)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    for a, b in zip(*(torch.autograd.grad(loss, (images, texts)) for loss in (ours, plain))):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_keep_is_open_clips_loss_and_all_are_without_collisions():
    images, texts, scale, labels = pairs()
    theirs = open_clip.ClipLoss()(images, texts, scale)
    assert PairLoss("keep")(images, texts, scale, labels).item() == theirs.item()
    for how in ("keep", "mask", "soft"):
        alone = PairLoss(how)(images, texts, scale, torch.arange(len(labels)))
        assert alone.item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("c", [0.1, 31.6])
def test_fit_head_is_scikit_learns_logistic_regression(c):
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 16, generator=random)
    labels = torch.randint(5, (300,), generator=random)
    features = normalize(centres[labels] + 2 * torch.randn(300, 16, generator=random))
    theirs = LogisticRegression(C=c, fit_intercept=False, tol=1e-10, max_iter=10000).fit(
        features.double(), labels
    )
    weight = fit_head(features, labels, 6, c)  # a sixth class, of no image
    assert weight.shape == (6, 16)
    weight = fit_head(features, labels, 5, c)
    assert_close(weight, torch.from_numpy(theirs.coef_), 1e-3)  # both stop short of the minimum


@pytest.mark.parametrize("c", [1, 1000])
def test_fit_head_in_float32_is_float64s_within_an_image(c):
    random = torch.Generator().manual_seed(0)
    centres, common = torch.randn(100, 64, generator=random), 2 * torch.randn(64, generator=random)
    labels = torch.randint(100, (4000,), generator=random)
    features = normalize(centres[labels] + 2 * torch.randn(4000, 64, generator=random) + common)
    train, test = features[:2000], features[2000:]
    exact, fast = (fit_head(train, labels[:2000], 100, c, dtype) for dtype in (None, torch.float32))
    right, as_right = (((test @ weight.T).argmax(1) == labels[2000:]).sum() for weight in (exact, fast))
    assert abs(right - as_right) <= 1 and right > 500
    assert exact.dtype == fast.dtype == torch.float32 and not torch.equal(exact, fast)


def test_a_batch_of_one_class_has_a_loss_under_mask():
    images, texts, scale, _ = pairs()
    loss = PairLoss("mask")(images, texts, scale, torch.zeros(12, dtype=torch.int64))
    assert loss.item() == 0 and all(g.isfinite().all() for g in torch.autograd.grad(loss, (images, texts)))


# In the loop


def plain_ce(model, head, images, tokens, labels):
    return cross_entropy(model.encode_image(images, normalize=True) @ head.T, labels)


def plain_flyp_ce(model, head, images, tokens, labels):
    classes = model.encode_text(
        open_clip.get_tokenizer(MODEL)([TEMPLATE.replace("{c}", n) for n in NAMES]), normalize=True
    )
    return cross_entropy(
        model.logit_scale.exp() * model.encode_image(images, normalize=True) @ classes.T, labels
    )


def plain_pairs(how, weight):
    def loss(model, head, images, tokens, labels):
        out = model(images, tokens)
        images, texts, scale = out["image_features"], out["text_features"], out["logit_scale"]
        same, own = labels[:, None] == labels, torch.eye(len(labels), dtype=torch.bool)
        total = 0
        for logits in (scale * images @ texts.T, scale * texts @ images.T):
            if how == "mask":
                logits = torch.where(same & ~own, -torch.inf, logits)
            target = same / same.sum(1, keepdim=True) if how == "soft" else own.float()
            total = total - torch.where(target > 0, target * logits.log_softmax(1), 0).sum(1).mean() / 2
        return total + weight * plain_class_term(images, texts, scale, labels)

    return loss


IN_THE_LOOP = {
    "ce": (["--objective", "ce"], plain_ce),
    "flyp-ce": (["--objective", "flyp-ce"], plain_flyp_ce),
    "mask": (["--collisions", "mask"], plain_pairs("mask", 0)),
    "soft": (["--collisions", "soft", "--ce-weight", 0.5], plain_pairs("soft", 0.5)),
}


@needs_sgd
@pytest.mark.parametrize("name", list(IN_THE_LOOP))
def test_a_plain_loop_gives_the_same_losses_and_weights(launch, start, digits, name):
    flags, loss = IN_THE_LOOP[name]
    folder = launch(*flags, *SGD, "--full-text", "--pretrained", start, "--seed", 3, "--report-to", "tensorboard",
                    name=f"loop-{name}")  # fmt: skip
    model = loaded(start)
    preprocess = open_clip.create_model_and_transforms(MODEL)[1]
    with torch.no_grad():
        head = torch.nn.Parameter(model.logit_scale.exp() * text_head(model.eval(), [TEMPLATE]).T)
    before = loaded(start).state_dict() | {"class_head.weight": head.detach().clone()}
    dataset = ClassPromptDataset(str(digits), preprocess, open_clip.get_tokenizer(MODEL), 100, seed=3,
                                 prompts=prompts(TEMPLATE), num_samples=200, with_labels=True)  # fmt: skip
    losses, trained = [], [*model.train().parameters(), head]
    momentum = torch.optim.SGD(trained, lr=0.1, momentum=0.9, nesterov=True)
    for images, texts in dataset:
        momentum.zero_grad()
        losses.append(loss(model, head, images, texts[:, :-1], texts[:, -1]))
        losses[-1].backward()
        momentum.step()
    got = weights(folder, 1)
    assert tensorboard_losses(folder) == pytest.approx([value.item() for value in losses], rel=FORWARD)
    expected = model.state_dict() | {"class_head.weight": head.detach()}
    before = {key: tensor for key, tensor in before.items() if key in got}
    assert_moved_alike(got, expected, before)
    for key, tensor in before.items():
        assert name != "ce" or key.startswith(("visual.", "class_head.")) or torch.equal(got[key], tensor), (
            key
        )


@needs_sgd
@pytest.mark.parametrize(
    "flags",
    [
        ["--objective", "ce"],
        ["--objective", "flyp-ce"],
        ["--collisions", "mask", "--ce-weight", 0.5],
    ],
    ids=lambda flags: flags[1],
)
def test_accumulation_equals_one_batch(launch, start, flags):
    # open_clip's loop adds up the gradient of logit_scale once a part: so one step, after which the others would differ
    flags = [*flags, *SGD, "--pretrained", start, "--train-num-samples", 100]
    whole = weights(launch(*flags, name=f"whole-{flags[1]}"), 1)
    parts = weights(launch(*flags, "--batch-size", 50, "--accum-freq", 2, name=f"parts-{flags[1]}"), 1)
    before = {key: tensor for key, tensor in loaded(start).state_dict().items() if key != "logit_scale"}
    assert_moved_alike(parts, whole, before)


@pytest.mark.skipif(
    not hasattr(openclip.parse_args([]), "torchcompile_strategy"),
    reason="this open_clip has one strategy (before 4)",
)
@pytest.mark.parametrize("strategy", ["task", "model", "step"])
@pytest.mark.parametrize(
    "flags", [[], ["--objective", "ce"], ["--objective", "flyp-ce"]], ids=lambda flags: "".join(flags[1:])
)
def test_each_way_of_compiling_gives_the_same_losses(launch, start, flags, strategy):
    flags = [*flags, *SGD[2:], "--pretrained", start, "--report-to", "tensorboard"]
    name = f"{flags[1]}-{strategy}".replace("/", "-")
    eager = tensorboard_losses(launch(*flags, name=f"eager-{name}"))
    how = ["--torchcompile", "--torchcompile-strategy", strategy, "--torchcompile-backend", "aot_eager"]
    compiled = tensorboard_losses(launch(*flags, *how, name=f"compiled-{name}"))
    assert compiled == pytest.approx(eager, rel=FORWARD)


# 80 images in one step, however they are shared out
TWO_RANKS = {
    "soft": ["--collisions", "soft", "--ce-weight", 0.5],
    "lp-ft": ["--objective", "lp-ft"],
    # in the first step the model is its own teacher
    "anchor": ["--anchor", 3, "--anchor-teacher", "trajectory", "--epochs", 3, "--save-frequency", 3],
}
EIGHTY = [*SGD, "--shots", 8, "--train-num-samples", 80, "--epochs", 1]


@pytest.fixture(scope="module")
def on_two_ranks(digits, start, tmp_path_factory):
    """The folder with a run of each of TWO_RANKS."""
    logs = tmp_path_factory.mktemp("two")
    argv = [*run_of(digits, logs, workers=1), "--dist-backend", "gloo", "--pretrained", start, *EIGHTY]
    argvs = [[*argv, "--batch-size", 40, "--name", name, *flags] for name, flags in TWO_RANKS.items()]
    ranks.train_in_turn(2, [[str(word) for word in argv] for argv in argvs], logs / "said", logs / "losses")
    return logs


@needs_sgd
@pytest.mark.parametrize("name", list(TWO_RANKS))
def test_two_ranks_equal_one_process(launch, start, on_two_ranks, name):
    flags = ["--pretrained", start, *EIGHTY, "--batch-size", 80, *TWO_RANKS[name]]
    folder, epoch = launch(*flags, name=f"one-{name}"), 3 if name == "anchor" else 1
    one, two = weights(folder, epoch), weights(on_two_ranks / name, epoch)
    two = {key.removeprefix("module."): tensor for key, tensor in two.items()}
    before = loaded(start).state_dict()
    assert_moved_alike(two, one, before)
    if "class_head.weight" in one:
        # L-BFGS ends where the loss L falls by less than 1e-13 a step; at a distance d of the minimum it is above it
        # by at least d^2 / (2 c n), which holds the fit to sqrt(2e-13 c n) = 2e-5 an entry, whatever the kernels
        assert_close(two["class_head.weight"], one["class_head.weight"], 1e-4)
    moved = [key for key in before if not torch.equal(before[key], one[key])]
    assert "visual.proj" in moved and ("text_projection" in moved) == (name != "lp-ft")
    if name == "anchor":
        teachers = [load_file(teacher_path(run / "checkpoints", 3)) for run in (on_two_ranks / name, folder)]
        assert_moved_alike(*teachers, before)


def test_a_resumed_ce_run_equals_an_uninterrupted_one(launch, start, tuned, digits):
    flags = ["--objective", "ce", "--epochs", 2, "--pretrained", start, "--eval-data", f"val={digits}"]
    folder = launch(*flags, name="stopped")
    (folder / "checkpoints" / "epoch_2.pt").unlink()
    resumed = launch(*flags, "--resume", "latest", name="stopped")
    assert_equal(weights(resumed, 2), weights(tuned, 2))


def test_labels_come_with_the_tokens_only_where_asked_for(digits):
    tokenizer, preprocess = open_clip.get_tokenizer("ViT-B-32"), open_clip.image_transform(16, is_train=False)
    plain, labelled = (
        next(iter(ClassPromptDataset(str(digits), preprocess, tokenizer, 50, with_labels=also)))
        for also in (False, True)
    )
    assert torch.equal(labelled[0], plain[0]) and torch.equal(labelled[1][:, :-1], plain[1])
    names = [
        name
        for row in plain[1]
        for name in NAMES
        if f" {name}." in tokenizer.decode(row.tolist()).replace(" .", ".")
    ]
    assert [NAMES[label] for label in labelled[1][:, -1]] == names


# Linear probes


def features(model, digits, split):
    dataset = LabelledDataset(expand_source(str(digits), split), val_preprocess(model), 250, num_classes=10)
    with torch.no_grad():
        batches = [(model.encode_image(b["images"], normalize=True), b["labels"]) for b in dataset]
    return map(torch.cat, zip(*batches))


def test_lp_is_logistic_regression_on_frozen_features(probed, start, digits, caplog):
    got, model = weights(probed, 1), loaded(start).eval()
    assert all(torch.equal(got[key], tensor) for key, tensor in model.state_dict().items())
    x, y = features(model, digits, "train")
    theirs = LogisticRegression(C=31.6, fit_intercept=False, tol=1e-5, solver="newton-cg").fit(x.double(), y)
    x, y = features(model, digits, "test")
    assert (
        abs(theirs.score(x.double(), y) * len(y) - ((x @ got["class_head.weight"].T).argmax(1) == y).sum())
        <= 1
    )
    zeroshot, fitted = results(probed)
    assert (params(probed)["epochs"], zeroshot["epoch"], fitted["epoch"]) == ("1", 0, 1)
    assert abs(fitted["val/top1"] - theirs.score(x.double(), y)) * len(y) <= 1.001
    assert fitted["val/top1"] > zeroshot["val/top1"] + 0.1


def test_lp_ft_goes_on_from_the_head_of_lp(launch, start, probed):
    still = launch("--objective", "lp-ft", "--pretrained", start, "--lr", 0, "--wd", 0, name="still")
    assert_equal(weights(still, 1), weights(probed, 1))


# What reads a learned head


def model_flags(digits):
    return ["--model", MODEL, "--model-config", f"{digits}/{MODEL}.json", "--device", "cpu"]


def data_flags(digits):
    return ["--workers", "0", "--eval-data", f"val={digits}", "--json"]


def test_eval_wiseft_and_export_read_a_learned_head(tuned, start, digits, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    checkpoint = str(tuned / "checkpoints" / "epoch_2.pt")
    torch.load(checkpoint, weights_only=True)
    assert load_head(weights(tuned, 2)).class_prompts.classnames == NAMES
    before, _, after = (
        {k.removeprefix("val/"): v for k, v in row.items() if k != "epoch"} for row in results(tuned)
    )

    def evaluated(path):
        flyp(["eval", str(path), *model_flags(digits), *data_flags(digits)])
        return json.loads(capsys.readouterr().out)["results"]["val"]

    for path, figures in ((checkpoint, after), (start, before)):  # in batches of another size than training's
        assert_same_figures(evaluated(path), figures)
    assert after != before
    flyp(["wiseft", *model_flags(digits), *data_flags(digits), "--pretrained", str(start), "--finetuned", checkpoint,
          "--alphas", "0:1:0.5", "--save-all", "--out", str(tmp_path / "merged")])  # fmt: skip
    alphas = json.loads(capsys.readouterr().out)["alphas"]
    for alpha, figures in (("0.00", before), ("1.00", after)):
        assert_same_figures(alphas[alpha]["val"], figures)
    half = tmp_path / "merged" / "wise_ft_alpha=0.50.pt"
    assert_same_figures(evaluated(half), alphas["0.50"]["val"])
    model = loaded(start)
    zeroshot = (model.logit_scale.exp() * text_head(model.eval())).T
    expected = (zeroshot + weights(tuned, 2)["class_head.weight"]) / 2
    assert_close(torch.load(half)["class_head.weight"], expected)

    flyp(["export", str(half), *model_flags(digits), "--format", "timm", "--out", str(tmp_path / "timm")])
    twin = timm.create_model(f"local-dir:{tmp_path}/timm", pretrained=True).eval()
    ours = ImageClassifier.from_checkpoint(MODEL, half, prompts())
    images = torch.randn(50, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert twin.pretrained_cfg["label_names"] == NAMES
        assert_same_choices(twin(images), ours(images))
    flyp(
        [
            "export",
            str(half),
            *model_flags(digits),
            "--format",
            "open_clip",
            "--out",
            str(tmp_path / "open_clip"),
        ]
    )
    assert says(caplog.text, "learned head", "--format timm")
    towers = open_clip.create_model(f"local-dir:{tmp_path}/open_clip")
    assert all(torch.equal(tensor, torch.load(half)[key]) for key, tensor in towers.state_dict().items())


def test_a_learned_head_is_restricted_by_name(tuned, digits, tmp_path, capsys):
    images, labels = digit_images()
    some = ["seven", "two", "nine"]
    chosen = [i for i in range(1000, 1200) if NAMES[labels[i]] in some]
    write_set(
        tmp_path / "some", [images[i] for i in chosen], [some.index(NAMES[labels[i]]) for i in chosen], some
    )
    checkpoint = tuned / "checkpoints" / "epoch_2.pt"
    flyp(
        [
            "eval",
            str(checkpoint),
            *model_flags(digits),
            "--workers",
            "0",
            "--eval-data",
            f"some={tmp_path}/some",
            "--json",
        ]
    )
    top1 = json.loads(capsys.readouterr().out)["results"]["some"]["top1"]
    classifier = ImageClassifier.from_checkpoint(MODEL, checkpoint, prompts())
    with torch.no_grad():
        logits = classifier(torch.stack([classifier.preprocess(images[i]) for i in chosen]))
    right = [some[row.argmax()] == NAMES[labels[i]] for row, i in zip(logits[:, [7, 2, 9]], chosen)]
    assert abs(top1 * len(right) - sum(right)) <= 1.001  # a tie may fall otherwise in batches of another size
    with pytest.raises(InputError, match=naming("'eleven'", "10", "zero")):
        ImageClassifier.from_checkpoint(MODEL, checkpoint, ClassPrompts(["two", "eleven"], [TEMPLATE]))


def test_names_that_are_there_twice_keep_their_order():
    assert find_class_rows(["crane", "cat", "crane"], ["crane", "crane", "cat"]) == [0, 2, 1]
    assert find_class_rows(["sea lion", "caf\u00e9"], ["cafe\u0301", "sea\u00a0 lion"]) == [1, 0]
    assert find_class_rows(open_clip.IMAGENET_CLASSNAMES, open_clip.IMAGENET_CLASSNAMES) == list(range(1000))


def test_heads_of_other_classes_are_not_merged(tuned, start, digits, tmp_path):
    state = weights(tuned, 2)
    head = load_head(state)
    other = ClassPrompts([*NAMES[1:], NAMES[0]], TEMPLATES)
    state |= {"class_head.prompts": type(head)(head.weight, other).prompts}
    torch.save(state, tmp_path / "other.pt")
    both = [str(tuned / "checkpoints" / "epoch_2.pt"), str(tmp_path / "other.pt")]
    with pytest.raises(InputError, match=naming("other.pt", "epoch_2.pt", "learned")):
        flyp(["wiseft", *model_flags(digits), "--pretrained", str(start), "--average", *both, "--alpha", "1", "--out",
              str(tmp_path / "merged")])  # fmt: skip


def test_training_does_not_start_from_a_learned_head(launch, tuned):
    with pytest.raises(
        InputError,
        match=naming("epoch_2.pt", "learned head", "flyp export --format open_clip"),
    ):
        launch("--pretrained", tuned / "checkpoints" / "epoch_2.pt", name="again")


@pytest.mark.parametrize(
    "flags", [["--objective", "ce"], ["--objective", "flyp-ce"]], ids=lambda flags: flags[1]
)
def test_a_sigmoid_model_is_fine_tuned_by_cross_entropy(launch, digits, tmp_path, flags):
    config = json.loads((digits / f"{MODEL}.json").read_text()) | {
        "init_logit_bias": -10,
        "custom_text": True,
    }
    (tmp_path / "digits-sigmoid.json").write_text(json.dumps(config))
    model = ["--model", "digits-sigmoid", "--model-config", tmp_path / "digits-sigmoid.json"]
    state = weights(launch(*flags, *model, "--train-num-samples", 100, name=f"sigmoid-{flags[1]}"), 1)
    assert state["logit_bias"] == -10


# Few shots


def test_shots_are_the_images_of_shards_subset(launch, start, digits, tmp_path, caplog):
    caplog.set_level("INFO")
    flyp(["shards", "subset", str(digits), str(tmp_path / "few" / "train"), "--shots", "7", "--seed", "5"])
    flags = ["--pretrained", start, "--train-num-samples", 70, "--batch-size", 32, "--warmup", 0]
    few = launch(*flags, "--train-data", tmp_path / "few", name="few")
    shots = launch(*flags, "--shots", 7, "--shots-seed", 5, name="shots")
    assert_equal(weights(shots, 1), weights(few, 1))
    log = (shots / "out.log").read_text()
    assert says(log, "70", "16 shards") and "Steps: 3 " in log
    assert re.search(r"Train Epoch: 0 \[ *\d+/70 ", log)


def test_a_class_of_fewer_images_gives_all_and_is_named(launch, digits, caplog):
    folder = launch("--shots", 101, "--batch-size", 500, "--train-num-samples", 100, name="many")
    named = next(line for line in caplog.text.splitlines() if says(line, "classes", "101 images"))
    counts = dict(re.findall(r"(\w+) \((\d+)\)", named))
    assert counts and set(counts) <= set(NAMES) and all(int(count) < 101 for count in counts.values())
    assert says((folder / "out.log").read_text(), "100", "16 shards")


# Mistakes


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--objective", "lp", "--siglip"], ("--objective lp", "--siglip")),
        (["--ce-weight", "1", "--siglip"], ("--ce-weight 1.0", "--siglip")),
        (["--objective", "ce", "--collisions", "mask"], ("--collisions mask", "--objective ce")),
        (["--objective", "lp", "--ce-weight", "1"], ("--ce-weight 1.0", "--objective lp")),
        (["--ce-weight", "-1"], ("--ce-weight", "-1")),
        (["--ce-weight", "nan"], ("--ce-weight", "nan")),
        (["--objective", "lp", "--lock-image"], ("--objective lp", "--lock-image")),
        (["--objective", "ce", "--lock-image"], ("--objective ce", "--lock-image")),
        (["--objective", "lp-ft", "--dataset-resampled"], ("--objective lp-ft", "--dataset-resampled")),
        (["--objective", "ce", "--lp-c", "1"], ("--lp-c", "--objective ce")),
        (["--objective", "lp", "--lp-c", "0"], ("--lp-c", "0")),
        (["--shots", "0"], ("0", "shots")),
        (["--shots-seed", "1"], ("--shots-seed", "--shots")),
        (["--shots", "1", "--train-data", "pipe:cat x.tar", "--classnames", "{digits}/classnames.txt"], ("pipe:cat x.tar",)),
        (["--objective", "ce", "--eval-data", "val={digits}", "--classnames", "{names}"], ("'zero'", "10 missing", "--eval-data val", "10")),
        (["--model", "digits-coca", "--collisions", "mask"], ("--collisions mask", "CoCa", "digits-coca")),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)  # fmt: skip
def test_flags_that_do_not_go_together_are_one_sentence(digits, tmp_path, flags, named):
    config = json.loads((digits / f"{MODEL}.json").read_text())
    config["multimodal_cfg"] = config["text_cfg"] | {"context_length": 76, "attn_pooler_heads": 4}
    config["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True}
    config["text_cfg"] |= {"embed_cls": True, "output_tokens": True, "context_length": 76}
    (tmp_path / "digits-coca.json").write_text(json.dumps(config | {"custom_text": True}))
    (tmp_path / "names.txt").write_text("\n".join(f"the {name}" for name in NAMES))
    open_clip.add_model_config(tmp_path / "digits-coca.json")
    argv = run_of(digits, tmp_path, workers=0)
    with pytest.raises(InputError, match=naming(*named)) as error:
        train([*argv, *(flag.format(digits=digits, names=tmp_path / "names.txt") for flag in flags)])
    assert "\n" not in str(error.value)


def test_flags_and_their_owners_agree():
    actions = {action.dest: action for action in flags.parser()._actions}
    assert actions["objective"].choices == tuple(objectives.OBJECTIVES)
    assert actions["collisions"].choices == objectives.COLLISIONS
    assert actions["max_lost"].default == MAX_LOST
    assert f"(default: {LP_C})" in actions["lp_c"].help
