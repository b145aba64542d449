"""What is true of a GPT and of the program around it, in the order of gpt.py. Each test checks a
fact in a way of its own: by NumPy in float64, by counting, by TensorFlow. None uses the network.
What needs GPT-2's vocabulary or OpenAI's weights is skipped where they are not at hand."""

import csv
import functools
import hashlib
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow shall be silent
os.environ["http_proxy"] = os.environ["https_proxy"] = "http://127.0.0.1:9"  # no proxy is there
os.environ |= {"no_proxy": "127.0.0.1", "PYTHONUNBUFFERED": ""}
os.environ |= {"OMP_NUM_THREADS": "4", "GOMP_SPINCOUNT": "5000"}  # in other processes

import numpy as np
import pytest
import tiktoken
import torch

import gpt

torch.set_num_threads(1)  # these models are too small to be shared by several cores
SOURCE = Path(gpt.__file__).read_text(encoding="utf-8")
TINY = gpt.GPTConfig(vocab_size=61, context_length=12, n_embd=24, n_head=3, n_layer=2)
FLAT = gpt.GPTConfig(vocab_size=300, context_length=7, n_embd=8, n_head=1, n_layer=1)
DEEP = gpt.GPTConfig(vocab_size=23, context_length=16, n_embd=12, n_head=3, n_layer=12)
three_shapes = pytest.mark.parametrize("config", [TINY, FLAT, DEEP], ids=["tiny", "flat", "deep"])
HERE = Path(gpt.__file__).parent
os.environ["PYTHONPATH"] = str(HERE)  # in other processes
LESSON = "The quick brown fox jumps over the lazy dog. " * 12
SHAPE = "--context 16 --n-layer 1 --n-head 2 --n-embd 32"
PACE = "--batch-size 4 --stride 12 --steps 2 --warmup 5 --eval-every 20 --save-every 80"
BARE = f"train --data lesson.txt --val-fraction 0.1 --prompt Hey --device cpu {SHAPE} {PACE}"
TRAIN = f"{BARE} --tokenizer 280"  # of options that are given twice, the last counts
RANDOM = f"{TRAIN} --dropout 0.2 --accumulate 2 --eval-every 3 --save-every 7"
ONE_WINDOW = f"{TRAIN} --stride 1000000 --batch-size 1"
PACKED = f"{BARE} --tokenizer gpt2 --n-embd 8 --data tokens.bin"
RESUME = "train --resume"
RECITE = "sample --checkpoint model.pt --device cpu --prompt A --temperature 0"
LAST = Path("out/checkpoint.pt")  # of a run without --out
HPARAMS = "hparams.json"
DATA = "model.ckpt.data-00000-of-00001"
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="kills, or counts kilobytes")
both_arithmetics = pytest.mark.parametrize("fused", [True, False], ids=["fused", "by hand"])


def random_model(config=TINY, **changes):
    """A GPT, not in training, whose parameters have left their first values: no bias is 0."""
    torch.manual_seed(0)
    model = gpt.GPT(replace(config, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def random_tokens(*shape, below=TINY.vocab_size):
    """The same tokens for the same shape, each time."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(1))


def continuation(model, prompt, count, **settings):
    """All that generate yields, side by side: (B, count)."""
    return torch.stack(list(gpt.generate(model, prompt, count, **settings)), dim=1)


def softmax(x):
    """In NumPy, over the last axis."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def assert_close(actual, expected, tolerance):
    """No number differs by more than the tolerance times the largest number that is expected."""
    actual = torch.as_tensor(actual).detach().double().numpy()
    expected = torch.as_tensor(expected).detach().double().numpy()
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test works in a folder of its own, which has the lesson in it."""
    monkeypatch.chdir(tmp_path)
    Path("lesson.txt").write_text(LESSON)


@pytest.fixture
def vocabulary():
    """GPT-2's tokenizer, where tiktoken has it or can get it."""
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:
        pytest.skip(f"tiktoken can't get GPT-2's vocabulary: {error}")


def run(capsys, command, *more):
    """What `python gpt.py COMMAND MORE` writes to standard output (.out) and error (.err)."""
    capsys.readouterr()
    gpt.main([*shlex.split(command), *more])
    return capsys.readouterr()


def refusal(capsys, command, status=2):
    """The last line on standard error, `gpt.py: error: ...`, of a command that ends with status."""
    with pytest.raises(SystemExit) as ending:
        run(capsys, command)
    error = capsys.readouterr().err
    assert ending.value.code == status and "Traceback" not in error and "usage" not in error
    assert error.splitlines()[-1].startswith("gpt.py: error: ")
    return error.splitlines()[-1]


def python(*command):
    """(standard output, standard error) of `python COMMAND` in a process of its own."""
    how = {"capture_output": True, "encoding": "utf-8", "timeout": 120}
    done = subprocess.run([sys.executable, *command], check=False, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def fork(command, rows=None):
    """`python gpt.py COMMAND` in a process that is there at once, from its start to its end.
    With rows, the end is a kill, as soon as log.csv has so many."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpt", "torch._dynamo"])
    process = context.Process(target=gpt.main, args=(command.split(),))
    process.start()
    if rows is not None:
        while len(log()) < rows:
            assert process.is_alive()
            time.sleep(0.01)
        process.kill()
    process.join()


def log(out="out"):
    """The rows of log.csv as dicts, without the speed, which no two runs share."""
    if not Path(out, "log.csv").exists():
        return []
    with open(Path(out, "log.csv"), newline="") as file:
        return [row | {"tokens_per_second": None} for row in csv.DictReader(file)]


def losses(out="out"):
    return np.array([float(row["train_loss"]) for row in log(out)])


def weights(path=LAST):
    """All parameters of a checkpoint, side by side."""
    return torch.nn.utils.parameters_to_vector(gpt.load_checkpoint(path)[0].parameters())


def training_state(out="out"):
    return gpt.load_checkpoint(Path(out, "checkpoint.pt"))[2]


def first_means(out="out"):
    """AdamW's running means of the gradients, of all parameters side by side."""
    states = training_state(out)["optimizer"]
    return torch.cat([states[number]["exp_avg"].flatten() for number in sorted(states)])


# ==================================================================================================
# 1 Config
SIZES = {"124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200}


@pytest.mark.parametrize("size", SIZES)
def test_gpt2_has_the_published_number_of_parameters(size):
    """OpenAI's four models differ in C, H and blocks; the tied output head has none of its own."""
    config = gpt.GPT2_CONFIGS[size]
    assert config.n_embd == 64 * config.n_head
    with torch.device("meta"):  # shapes without memory
        model = gpt.GPT(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[size]


def test_an_impossible_shape_is_refused():
    """Sizes are whole numbers from 1 up, heads share the channels evenly, dropout is in [0, 1)."""
    names = ("vocab_size", "context_length", "n_embd", "n_head", "n_layer")
    wrong = [*itertools.product(names, [0, 1.5]), ("n_head", 5)]
    wrong += [("dropout", 1.0), ("dropout", -0.1), ("dropout", math.nan)]
    for name, value in wrong:
        with pytest.raises(gpt.UserError, match=name):
            gpt.GPTConfig(**{name: value})


# ==================================================================================================
# 2 Layers
@both_arithmetics
def test_layernorm_brings_each_token_to_mean_0_and_variance_1(fused):
    """Whatever they were before, also in float16, where the square of 1,000 is too large."""
    torch.manual_seed(0)
    layer = gpt.LayerNorm(replace(TINY, fused=fused)).to(torch.float16)
    y = layer(300 + 1000 * torch.randn(5, 24, dtype=torch.float16))
    assert y.dtype == torch.float16
    y = y.double().detach().numpy()
    assert y.mean(axis=-1) == pytest.approx(np.zeros(5), abs=1e-3)
    assert y.var(axis=-1) == pytest.approx(np.ones(5), abs=1e-3)


def numpy_attention(q, k, v):
    """(scores, weights, result) by the formula: query i is token S - T + i and sees up to it."""
    T, D = q.shape[-2:]
    S = k.shape[-2]
    scores = q @ np.swapaxes(k, -1, -2) / np.sqrt(D)
    scores = np.where(np.tri(T, S, S - T, dtype=bool), scores, -np.inf)
    weights = softmax(scores)
    return scores, weights, weights @ v


def test_the_worked_example_of_attention_is_right():
    """The table above attention() shows q, k, v, scores, weights and results of three tokens."""
    pair = r"\([\d.]+, [\d.]+\)"
    lines = [line for line in SOURCE.splitlines() if len(re.findall(pair, line)) == 4]
    numbers = [re.findall(r"-inf|[\d.]+", line.replace("∞", "inf")) for line in lines]
    table = np.array(numbers, dtype=float)
    q, k, v, *shown = np.split(table, [2, 4, 6, 9, 12], axis=1)
    for columns, expected in zip(shown, numpy_attention(q, k, v), strict=True):
        np.testing.assert_allclose(columns, expected, atol=0.0051)  # two decimals are shown


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@three_shapes
def test_the_hand_written_arithmetic_is_that_of_the_kernels(config, dtype, tolerance):
    """With fused=True and fused=False the logits and the gradients of all parameters agree."""
    tokens = random_tokens(3, config.context_length + 1, below=config.vocab_size)
    logits = []
    gradients = []
    for fused in (True, False):
        model = random_model(config, fused=fused).to(dtype)
        logits.append(model(tokens[:, :-1]))
        gpt.cross_entropy(logits[-1], tokens[:, 1:]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert_close(logits[0], logits[1], tolerance)
    assert_close(gradients[0], gradients[1], tolerance)


@both_arithmetics
def test_no_token_sees_those_behind_it(fused):
    """Another token at t changes the logits from t on, and leaves those before t as they were."""
    model = random_model(fused=fused)
    tokens = random_tokens(2, 12)
    for t in range(12):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % TINY.vocab_size
        same = (model(changed) == model(tokens)).all(dim=-1)  # (B, T)
        assert same.tolist() == [[position < t for position in range(12)]] * 2


DROPOUT = 0.3
WIDE = gpt.GPTConfig(61, context_length=64, n_embd=64, n_head=1, n_layer=1, dropout=DROPOUT)


def assert_dropped(dropped, plain):
    """Of these numbers, none of them 0, a share of DROPOUT is 0 now; the others are larger."""
    assert (plain != 0).all()
    zeros = dropped == 0
    margin = 5 * math.sqrt(DROPOUT * (1 - DROPOUT) / zeros.numel())  # five standard deviations
    assert abs(zeros.float().mean().item() - DROPOUT) < margin
    torch.testing.assert_close(dropped[~zeros], plain[~zeros] / (1 - DROPOUT))


@both_arithmetics
def test_dropout_acts_on_the_attention_weights(fused):
    """With equal keys all weights are equal, and where v is the identity, they are the result."""
    torch.manual_seed(0)
    layer = gpt.CausalSelfAttention(replace(WIDE, fused=fused))
    q = k = torch.ones(20, 1, 64, 64)
    v = torch.eye(64).expand(20, 1, 64, 64)
    seen = torch.ones(20, 1, 64, 64, dtype=torch.bool).tril()
    assert_dropped(layer.train().attend(q, k, v)[seen], layer.eval().attend(q, k, v)[seen])


def test_dropout_acts_on_the_embeddings_and_on_what_is_added_to_the_stream():
    """It acts before the first block, and on the results of attention and feed-forward network.
    A projection of 0 leaves only its bias, whatever dropout does to the attention weights."""
    model = random_model(WIDE)
    block = model.blocks[0]
    torch.nn.init.zeros_(block.attention.projection.weight)
    x = torch.randn(500, 1, 64)
    for layer in (block.attention, block.feed_forward):
        assert_dropped(layer.train()(x), layer.eval()(x))
    inputs = []
    block.register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
    for training in (True, False):
        model.train(training)(random_tokens(8, 64))
    assert_dropped(inputs[0], inputs[1])


# ==================================================================================================
# 3 Model
def test_a_new_model_begins_as_gpt2_did():
    """Biases are 0, matrices N(0, 0.02²), smaller by sqrt(2 n_layer) if they add to the stream."""
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(500, context_length=64, n_embd=128, n_head=4, n_layer=8))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            gain = "norm" in name and name.endswith("weight")
            assert parameter.unique().tolist() == [1.0 if gain else 0.0], name
        else:
            adds = name.endswith(("attention.projection.weight", "feed_forward.projection.weight"))
            expected = 0.02 / math.sqrt(2 * 8) if adds else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.05 * expected, name


def numpy_loss(logits, targets):
    """The mean of -log softmax(logits)[target]: (..., V), (...) -> a number."""
    p = np.take_along_axis(softmax(logits), targets[..., None], axis=-1)
    return -np.log(p).mean()


def test_the_loss_is_the_mean_of_minus_the_logarithm_of_the_probability():
    """Its gradient is (softmax - one-hot) / number of tokens, also where exp(logit) is infinite.
    Logits of 16 bits are widened first: bfloat16 would make 6.906 of ln 1000."""
    x = np.random.default_rng(0).normal(size=(4, 5, 11))
    x[0] *= 10_000
    targets = x.argmax(axis=-1)  # where the logits are huge, the others have the probability 0
    targets[1:] = random_tokens(3, 5, below=11)
    logits = torch.tensor(x, requires_grad=True)
    loss = gpt.cross_entropy(logits, torch.tensor(targets))
    loss.backward()
    assert loss.item() == pytest.approx(numpy_loss(x, targets), rel=1e-12)
    assert_close(logits.grad, (softmax(x) - np.eye(11)[targets]) / 20, 1e-13)
    loss = gpt.cross_entropy(torch.zeros(1000, dtype=torch.bfloat16), torch.tensor(7))
    assert loss.item() == pytest.approx(math.log(1000), rel=1e-6)


# ==================================================================================================
# 4 Dataset
def pieces(ranks, text):
    """The tokens into which tiktoken, with these ranks, cuts a text."""
    tokenizer = gpt.make_tokenizer(ranks)
    return [tokenizer.decode([token]) for token in tokenizer.encode(text)]


def test_a_text_is_cut_into_words_before_pairs_are_merged():
    """No token crosses the border of a word: learned until no pair is left, each word is a token.
    train_bpe() cuts by Python's regular expressions as tiktoken does by its own."""
    example = ["I", "'d", " say", " 42", "!"]
    assert "  ".join(f'"{word}"' for word in example) in SOURCE
    other = ["naïve", "_", "café", " ", " (", "über", ").", "\n", "x", "__", "12", " “", "Ça"]
    for words in (example, other):
        text = "".join(words)
        assert pieces(gpt.train_bpe(text, 400), text) == words


def test_the_worked_example_of_byte_pairs_is_right():
    """The docstring of train_bpe() shows three tokens that are learned, and how words are cut."""
    docstring = " ".join(gpt.train_bpe.__doc__.split())
    text = " hug hug hugs pug"
    assert f'"{text}"' in docstring
    found = re.findall(r'(\d)[a-z ,]* (\d{3}), "(.*?)"', docstring)
    assert [int(number) for _, number, _ in found] == [256, 257, 258]
    assert [text.count(token) for _, _, token in found] == [int(count) for count, _, _ in found]
    assert list(gpt.train_bpe(text, 259))[256:] == [token.encode() for _, _, token in found]
    rows = {'" h" "ug", " " p "ug"': 258, '" hug", " " p "ug"': 259, '" hug" g i n g': 259}
    for row, size in rows.items():
        assert row in docstring
        for word in row.split(", "):
            tokens = shlex.split(word)  # without the quotation marks
            assert pieces(gpt.train_bpe(text, size), "".join(tokens)) == tokens


def test_byte_pair_learning_ends_when_no_pair_is_left():
    """Until then, the most frequent one is merged; of equally frequent ones, the first one."""
    assert list(gpt.train_bpe("hug", 256)) == [bytes([byte]) for byte in range(256)]
    assert list(gpt.train_bpe("ab cd cd", 300))[256:] == [b" c", b" cd", b"ab"]
    assert list(gpt.train_bpe("aaaaa", 300))[256:] == [b"aa", b"aaaa", b"aaaaa"]
    with pytest.raises(gpt.UserError, match="255"):
        gpt.train_bpe("hug", 255)


@pytest.mark.parametrize("stride", [1, 3, 4, 7])
@pytest.mark.parametrize("length", [3, 4, 5, 30])
def test_windows_slide_by_the_stride_and_targets_are_one_token_ahead(length, stride):
    """Window i starts at i * stride; there are as many as fit together with their last target."""
    tokens = np.arange(65_500, 65_500 + length)
    for data in (torch.tensor(tokens), tokens.astype("<u2")):
        windows = gpt.SlidingWindows(data, context_length=4, stride=stride)
        starts = [start for start in range(0, length, stride) if start + 4 + 1 <= length]
        assert len(windows) == len(starts)
        for index, start in enumerate(starts):
            inputs, targets = windows[index]
            assert inputs.dtype == targets.dtype == torch.int64
            assert inputs.tolist() == tokens[start : start + 4].tolist()
            assert targets.tolist() == tokens[start + 1 : start + 5].tolist()
        for index in (-1, len(starts)):
            with pytest.raises(IndexError):
                windows[index]


def test_the_first_run_learns_the_story_by_heart(capsys):
    """With all defaults, but for the vocabulary, which is learned as without a network."""
    digest = hashlib.sha256((HERE / "the-verdict.txt").read_bytes()).hexdigest()
    assert digest == "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
    torch.set_num_threads(2)
    printed = run(capsys, "train --tokenizer 1024 --device cpu").out
    torch.set_num_threads(1)
    assert losses()[0] > 6.5 and losses()[-1] < 0.5
    assert "Jack Gisburn rather a cheap genius--though a good fellow enough" in printed


def test_offline_a_vocabulary_is_learned_unless_gpt2s_is_meant(capsys, monkeypatch):
    """A line says so. Where only GPT-2's will do, an error names the variable that helps."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "empty")
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # what was loaded before is forgotten
    assert "1,024 tokens are learned from the text" in run(capsys, BARE).err
    tokenizer = gpt.load_checkpoint(LAST)[1]
    assert gpt.load_tokenizer(None, str([*range(999)])).n_vocab == 1024
    assert tokenizer.decode(tokenizer.encode(LESSON)) == LESSON
    Path("x.bin").write_bytes(bytes(100))
    for reason in ("--tokenizer gpt2", "--data x.bin", "--gpt2 124M"):
        command = f"train --data lesson.txt --out new {reason}"
        assert "TIKTOKEN_CACHE_DIR" in refusal(capsys, command)
    monkeypatch.setattr(gpt, "WORLD_SIZE", 2)  # processes might learn different vocabularies
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **options: None)
    assert "TIKTOKEN_CACHE_DIR" in refusal(capsys, f"{BARE} --out new")


def test_a_bin_file_trains_as_the_text_that_it_was_made_from(vocabulary, capsys):
    """Raw uint16 tokens give the very losses of the text. One that is outside the vocabulary is
    a mistake when it is read, not before: nothing reads the file ahead."""
    tokens = np.array(vocabulary.encode(LESSON), dtype="<u2")
    tokens.tofile("tokens.bin")
    run(capsys, f"{PACKED} --eval-every 1")
    run(capsys, f"{PACKED} --eval-every 1 --data lesson.txt --out text")
    assert log() == log("text") and len(log()) == 2
    tokens[0] = 50257
    tokens.tofile("tokens.bin")
    line = refusal(capsys, f"{PACKED} --batch-size 1 --stride 16 --steps 99 --out bad")
    assert "50257" in line and 0 < len(log("bad")) < 99


@linux_only
def test_memory_does_not_grow_with_the_data(vocabulary):
    """2 GB of tokens take as much as 20 MB of them do."""
    code = f"""if True:
        import gpt, resource
        for size in (2 * 10**7, 2 * 10**9):
            open("tokens.bin", "wb").truncate(size)
            gpt.main("{PACKED} --out".split() + [str(size)])
            print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    output, _ = python("-c", code)
    os.remove("tokens.bin")
    small, large = [int(peak) for peak in re.findall(r"^peak (\d+)", output, re.MULTILINE)]
    assert large - small < 100_000  # kilobytes


# ==================================================================================================
# 5 Training


def test_adamw_has_the_betas_of_gpt3_and_decays_matrices_and_embeddings_alone(capsys):
    """A rate of 1e-9 and a decay of 1e9 leave nothing of these, and gains and biases as they were.
    The steps are those of a resumed run: there, too, --weight-decay counts."""
    run(capsys, TRAIN)
    model, _, _ = gpt.load_checkpoint(LAST, mapped=False)
    groups = gpt.make_optimizer(model, weight_decay=0.1).param_groups
    assert [group["betas"] for group in groups] == [(0.9, 0.95), (0.9, 0.95)]
    run(capsys, f"{RESUME} --steps 6 --learning-rate 1e-9 --weight-decay 1e9")
    decayed, _, _ = gpt.load_checkpoint(LAST)
    for before, after in zip(model.parameters(), decayed.parameters(), strict=True):
        expected = before if before.dim() == 1 else torch.zeros_like(before)
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)


def test_the_learning_rate_rises_evenly_and_falls_along_a_cosine():
    """From a quarter of the highest in 4 steps; half-way down after 5 more, a tenth after 10."""
    options = SimpleNamespace(steps=14, warmup=4, learning_rate=0.01)
    corners = {1: 0.0025, 2: 0.005, 4: 0.01, 9: 0.0055, 14: 0.001}
    assert {step: gpt.learning_rate(step, options) for step in corners} == pytest.approx(corners)
    for warmup, expected in ((0, 0.001), (1, 0.01), (20, 0.0005)):
        options = SimpleNamespace(steps=1, warmup=warmup, learning_rate=0.01)
        assert gpt.learning_rate(1, options) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_clipping_shortens_the_gradient_and_keeps_its_direction(dtype, capsys):
    """--clip 0.01 lets a gradient of that norm through, seen in AdamW's first mean.
    In float16 the gradient is divided by the scale before it is clipped."""
    for clip in ("1e9", "0.01"):
        run(capsys, f"{TRAIN} --steps 1 --dtype {dtype} --clip {clip} --out {clip}")
    long = first_means("1e9") / (1 - 0.9)  # the mean of 0 and the gradient, by a beta of 0.9
    short = first_means("0.01") / (1 - 0.9)
    assert 0.1 < long.norm() < 10
    assert short.norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(short, long * 0.01 / long.norm(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("arithmetic", ["", "--from-scratch"])
def test_a_tiny_model_learns_a_sentence_by_heart(arithmetic, capsys):
    """train, then sample from the checkpoint: two words bring back the whole sentence."""
    run(capsys, f"{TRAIN} --steps 150 --learning-rate 0.01 --stride 5 {arithmetic}")
    assert losses()[0] == pytest.approx(math.log(280), abs=0.3) and losses()[-1] < 0.1
    assert gpt.load_checkpoint(LAST)[0].config.fused is not bool(arithmetic)
    printed = run(capsys, "sample --temperature 0 --tokens 60 --prompt 'The quick'")
    assert printed.out.startswith(LESSON[:54])


def losses_times(factors):
    """A cross_entropy whose results are multiplied by these factors, one a call.
    When they are used up, it raises StopIteration, which no part of gpt.py expects."""
    real = gpt.cross_entropy
    left = iter(factors)
    return lambda logits, targets: next(left) * real(logits, targets)


def assert_same_run(one, other):
    """Every loss, every weight, AdamW's means and float16's scale are the same, to the bit."""
    assert log(one) == log(other)
    assert training_state(one)["scaler"] == training_state(other)["scaler"]
    assert torch.equal(first_means(one), first_means(other))
    for name in ("checkpoint.pt", "best.pt"):
        assert torch.equal(weights(Path(one, name)), weights(Path(other, name)))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_that_died_goes_on_to_the_bit(dtype, capsys, monkeypatch):
    """Dropout, windows, accumulation, scale: three deaths between checkpoints leave no trace."""
    command = f"{RANDOM} --steps 40 --dtype {dtype}"
    run(capsys, f"{command} --out whole")
    for calls in (30, 35, 30):  # a step takes two, a validation some: it dies far from a save
        with monkeypatch.context() as patch, pytest.raises(StopIteration):
            patch.setattr(gpt, "cross_entropy", losses_times([1] * calls))
            run(capsys, command)
        command = RESUME
    run(capsys, command)
    assert_same_run("out", "whole")


@linux_only
def test_a_killed_process_goes_on_to_the_bit():
    """Also where several threads share the work, in a model that is large enough for it."""
    larger = f"{RANDOM} --context 64 --batch-size 8 --n-embd 128 --steps 20"
    fork(larger, rows=8)
    assert len(log()) < 20, "it was to be killed before the end"
    for command in (RESUME, f"{larger} --out whole"):
        fork(command)
    assert_same_run("out", "whole")


def test_the_windows_of_a_step_depend_on_the_seed_and_the_step_alone(capsys, monkeypatch):
    """Neither the model, nor dropout, nor a sample in between has a part in it."""
    monkeypatch.setattr(gpt, "read_batches", Mock(wraps=gpt.read_batches))
    for out, options in enumerate(("", "--dropout 0.5 --n-embd 8 --save-every 1", "--seed 2")):
        run(capsys, f"{TRAIN} --seed 1 --steps 4 --val-fraction 0 --out {out} {options}")
    read = [tuple(call.args[1]) for call in gpt.read_batches.call_args_list]
    one, again, other = read[1:5], read[6:10], read[11:15]  # before them, none for validation
    assert one == again and len({*one, *other}) == 8


def test_dropout_draws_anew_in_every_step(capsys):
    """One window again and again, and a learning rate of 0: only dropout makes the losses differ.
    It does so after a validation and after a sample, too, which both do without it."""
    options = "--learning-rate 0 --dropout 0.5 --steps 9 --eval-every 2 --save-every 3"
    run(capsys, f"{ONE_WINDOW} {options}")
    assert len(set(losses())) == 9
    assert len({row["val_loss"] for row in log() if row["val_loss"]}) == 1


@pytest.mark.parametrize("dropout", [0, 0.5])
def test_every_process_draws_dropout_of_its_own(dropout, monkeypatch):
    """Processes 0 and 1 read the same window, and learn the same from it only without dropout."""
    learned = []
    for rank in (0, 1):
        monkeypatch.setattr(gpt, "RANK", rank)
        command = f"{ONE_WINDOW} --batch-size {1 + rank} --dropout {dropout} --out {rank}"
        options = gpt.make_parsers()[0].parse_args(command.split())
        learned.append(gpt.train(options).token_embedding)
    assert torch.equal(*learned) == (dropout == 0)


def test_a_batch_can_be_cut_into_micro_batches_and_processes(capsys):
    """8 windows, 4 twice, 4 in each of two processes, compiled or not: the same losses and means.
    Only the first of the processes prints. What they have saved, one process goes on with."""
    command = f"{TRAIN} --steps 6 --clip 1e9 --out"
    run(capsys, f"{command} whole --batch-size 8")
    run(capsys, f"{command} halves --accumulate 2")
    code = """if True:
        import functools, sys, torch, gpt
        def backend(graph, inputs):
            print("a compiled graph")
            return graph.forward
        torch.compile = functools.partial(torch.compile, backend=backend)
        leave = torch.distributed.destroy_process_group
        torch.distributed.destroy_process_group = lambda: None  # they stay together
        gpt.main([*sys.argv[1:], "pair"])
        torch.distributed.init_process_group = lambda timeout: None  # for a second run
        torch.distributed.destroy_process_group = leave
        gpt.main([*sys.argv[1:], "compiled", "--compile"])"""
    Path("pair.py").write_text(code)
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "pair.py"]
    output, error = python(*two, *command.split())
    assert output.count("Hey") == error.count("step 6/6") == 2 and "a compiled graph" in output
    for name in ("whole", "halves", "pair", "compiled"):
        run(capsys, f"{RESUME} --batch-size 4 --accumulate 2 --steps 9 --out {name}")
        np.testing.assert_allclose(losses(name), losses("whole"), rtol=0, atol=1e-5)
        torch.testing.assert_close(first_means(name), first_means("whole"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.03), ("float16", 0.004)])
def test_16_bits_train_almost_as_32(dtype, tolerance, capsys):
    """The losses are near those of float32, and not the same; the weights stay float32."""
    for name in ("float32", dtype):
        run(capsys, f"{TRAIN} --steps 8 --dtype {name} --out {name}")
    assert weights(f"{dtype}/checkpoint.pt").dtype == torch.float32
    difference = np.abs(losses("float32") - losses(dtype))
    assert 0 < difference.max() < tolerance


def test_float16_leaves_out_a_step_whose_gradient_is_too_large(capsys, monkeypatch):
    """The scale is halved, AdamW sees nothing, and the next step is taken.
    A scale of 65,536 that is below 1 after 1 + 16 such steps, one taken between, is one line."""
    with monkeypatch.context() as patch:
        patch.setattr(gpt, "cross_entropy", losses_times([1e30]))
        run(capsys, f"{TRAIN} --dtype float16 --steps 1 --val-fraction 0")
    assert first_means().count_nonzero() == 0
    assert training_state()["scaler"]["scale"] == 65536 / 2
    run(capsys, f"{RESUME} --steps 2")
    assert first_means().count_nonzero() > 0 and first_means().isfinite().all()
    monkeypatch.setattr(gpt, "cross_entropy", losses_times(itertools.repeat(1e30)))
    assert re.search(r"step 18\b.*--learning-rate", refusal(capsys, f"{RESUME} --steps 99"))


@pytest.mark.parametrize(("dtype", "factor"), [("float16", math.nan), ("float32", 3e37)])
def test_a_run_that_diverged_goes_on_with_a_lower_learning_rate(dtype, factor, capsys, monkeypatch):
    """The line has the step and the advice; the last good checkpoint stays, and --resume works."""
    with monkeypatch.context() as patch:
        patch.setattr(gpt, "cross_entropy", losses_times([1, 1, factor]))
        line = refusal(capsys, f"{TRAIN} --steps 4 --save-every 2 --val-fraction 0 --dtype {dtype}")
    assert re.search(r"step 3\b.*--learning-rate", line)
    assert training_state()["step"] == 2
    run(capsys, f"{RESUME} --learning-rate 1e-9")
    rates = [float(row["learning_rate"]) for row in log()]
    assert len(rates) == 4 and rates[1] > 1e-5 and rates[2] < 1e-8


def test_best_pt_has_the_lowest_validation_loss(capsys):
    """It is the mean over the end of the text, without dropout: computed from both checkpoints."""
    text = 2 * LESSON + "SPHINX OF BLACK QUARTZ, JUDGE MY VOW! 01234 PACK MY BOX WITH FIVE DOZEN"
    Path("lesson.txt").write_text(text)
    run(capsys, f"{TRAIN} --steps 40 --eval-every 1 --learning-rate 0.02 --dropout 0.1")
    measured = [float(row["val_loss"]) for row in log()]
    assert min(measured) < measured[-1] - 0.1, "it has risen since"
    for path, expected in (("out/best.pt", min(measured)), (LAST, measured[-1])):
        model, tokenizer, _ = gpt.load_checkpoint(path)
        tokens = torch.tensor(tokenizer.encode(text))
        tokens = tokens[len(tokens) - len(tokens) // 10 :]
        windows = torch.stack([tokens[i : i + 17] for i in range(0, len(tokens) - 16, 16)])
        predictions = model(windows[:, :-1]).transpose(1, 2)  # (B, V, T), as PyTorch wants it
        loss = torch.nn.functional.cross_entropy(predictions, windows[:, 1:])
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_the_end_of_the_text_is_never_trained_on(capsys):
    """Other letters in the last tenth change the validation loss, and no training loss."""
    tenth = len(LESSON) // 10
    for name, end in (("one", LESSON[-tenth:]), ("other", "?" * tenth)):
        Path("lesson.txt").write_text(LESSON[:-tenth] + end)
        run(capsys, f"{TRAIN} --tokenizer 257 --steps 30 --stride 1 --out {name}")
    assert list(losses("one")) == list(losses("other"))
    assert log("one")[-1]["val_loss"] != log("other")[-1]["val_loss"]


# ==================================================================================================
# 6 Decoding
LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.5, 1.2, -1.5, 0.5, 1.9])


def probabilities(p, temperature=1.0, top_k=None, top_p=None):
    """What the settings make of probabilities, one token after the other, in NumPy."""
    p = p ** (1 / temperature)
    p = p / p.sum()
    if top_k is not None and top_k < len(p):
        p[p < np.sort(p)[-top_k]] = 0  # those equal to the k-th stay
        p = p / p.sum()
    if top_p is not None:
        total = 0.0
        for token in np.argsort(-p):
            kept = p[token] if total < top_p else 0.0
            total += p[token]
            p[token] = kept
    return p / p.sum()


@pytest.mark.parametrize("top_p", [None, 0.01, 0.6, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 2, 4, 99])  # the 4th, 5th and 6th place are equal
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_the_probabilities_of_the_settings(temperature, top_k, top_p):
    """Temperature, then top-k with ties, then top-p, for each row by itself: counted in draws."""
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([LOGITS, LOGITS.flip(0)])  # (2, V)
    drawn = gpt.sample_token(rows.repeat(20_000, 1), generator=generator, **settings)
    for row, tokens in zip(rows, drawn.view(20_000, 2).T, strict=True):
        expected = 20_000 * probabilities(softmax(row.double().numpy()), **settings)
        counts = np.bincount(tokens, minlength=len(row))
        assert (counts[expected == 0] == 0).all()
        difference = (counts - expected)[expected > 0]
        chi_square = (difference**2 / expected[expected > 0]).sum()  # Pearson's test
        assert chi_square < 35, "with seven degrees of freedom, it is above in 1 of 100,000 cases"


def test_the_worked_example_of_sampling_is_right():
    """The table above sample_token() shows what each setting makes of four probabilities."""
    lines = re.findall(r"(.*?)((?:  +[01](?:\.\d\d)?){4})\n", SOURCE)
    table = np.array([columns.split() for _, columns in lines], dtype=float)
    words = "".join(words for words, _ in lines)
    temperature, sum_of_powers, top_k, top_p, sum_of_two = re.findall(r"[\d.]*\d", words)
    sharper = probabilities(table[0], float(temperature))
    three = probabilities(sharper, top_k=int(top_k))
    expected = [table[0], sharper, three, probabilities(three, top_p=float(top_p))]
    np.testing.assert_allclose(table, expected, atol=0.005)  # two decimals are shown
    assert sum_of_powers == f"{(table[0] ** (1 / float(temperature))).sum():.2f}"
    assert sum_of_two == f"{three[:2].sum():.2f}"


@both_arithmetics
@pytest.mark.parametrize(("rows", "cores"), [(3, 1), (1, 1), (1, 6), (1, 100)])
@pytest.mark.parametrize("lengths", [[12], [1] * 12, [5, 1, 1, 4, 1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_text_can_be_read_in_pieces(dtype, lengths, rows, cores, fused, monkeypatch):
    """With a cache, in float32 even beside 16-bit weights, the logits are those of the whole.
    One row is multiplied by a part of a matrix on each core, cut as the matrix lies in memory."""
    model = random_model(fused=fused)
    tokens = random_tokens(rows, 12)
    expected = model(tokens)
    model.to(dtype)
    query = model.blocks[0].attention.query
    query.weight.data = query.weight.data.t().contiguous().t()  # by columns, as OpenAI's
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    cache = gpt.KVCache(model.config, batch_size=rows, length=12)
    logits = torch.cat([model(piece, cache) for piece in tokens.split(lengths, dim=1)], dim=1)
    assert (cache.length, logits.dtype) == (12, dtype)
    assert cache.keys.dtype == cache.values.dtype == torch.float32
    assert_close(logits, expected, 20 * torch.finfo(dtype).eps)


def test_what_can_not_be_done_is_refused():
    """Settings without meaning, too long a text, no prompt, damaged weights: it says which."""
    model = random_model()
    wrong = [("top_k", 0), ("top_p", 0.0), ("top_p", 1.1), ("temperature", -1.0)]
    for name, value in [*wrong, ("temperature", math.nan)]:
        with pytest.raises(gpt.UserError, match=f"{name} is {value}"):
            gpt.sample_token(LOGITS[None], **{name: value})
    cache = gpt.KVCache(model.config, batch_size=1)
    model(random_tokens(1, 9), cache)
    with pytest.raises(gpt.UserError, match="13 .*12"):
        model(random_tokens(1, 4), cache)
    with pytest.raises(gpt.UserError, match="4 .*3"):
        model(random_tokens(1, 4), gpt.KVCache(model.config, batch_size=1, length=3))
    for prompt in (random_tokens(1, 0), random_tokens(0, 3), random_tokens(3)):
        with pytest.raises(gpt.UserError, match="prompt"):
            next(gpt.generate(model, prompt, 1))
    torch.nn.init.constant_(model.final_norm.weight, math.nan)
    with pytest.raises(gpt.UserError, match="finite"):
        next(gpt.generate(model, random_tokens(1, 3), 1))


@both_arithmetics
@pytest.mark.parametrize("prompt_length", [1, 5, 12, 31])
@pytest.mark.parametrize("longest", [12, 7, 2, 1])
def test_generating_is_recomputing_everything(longest, prompt_length, fused):
    """The cache and the other rows change no token, also where a full window is halved."""
    model = random_model(context_length=longest, fused=fused)
    prompt = random_tokens(3, prompt_length)
    said = continuation(model, prompt, 2 * longest + 5, temperature=0)
    for row, tokens in zip(prompt, said, strict=True):
        window = row[-longest:]
        for token in tokens:
            if len(window) > longest:
                window = window[-max(1, longest // 2) :]
            assert token == model(window[None])[0, -1].argmax()
            window = torch.cat([window, token[None]])


def test_16_bits_write_the_text_of_32_bits():
    """A model has learned a line by heart, and says it again and again, far beyond its window.
    Rounding the weights to float16 or bfloat16 changes no token, since the model is sure."""
    line = b"she sells sea shells by the sea shore. "
    text = torch.tensor([list(line * 6)])
    windows = text[0].unfold(0, size=17, step=1)[: len(line)]  # from each letter of the line
    model = random_model(vocab_size=128, context_length=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(80):
        gpt.cross_entropy(model(windows[:, :-1]), windows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        gpt.place(model, "cpu", dtype)
        assert torch.equal(continuation(model, text[:, :16], 100, temperature=0), text[:, 16:116])
    low = Mock(return_value=torch.full((1, 1, 9), -9e3).half(), config=model.config)
    assert len(next(gpt.generate(low, text[:, :9], 1))) == 1  # though the sum is beyond float16


def test_generate_heeds_its_settings():
    """Each of them can leave only the most probable token, where temperature 5 draws others, too.
    The same seed gives the same text, another gives another, and None a new one each time."""
    model = random_model()
    prompt = random_tokens(2, 3)
    best = continuation(model, prompt, 30, temperature=0)
    for settings in ({"top_k": 1}, {"top_p": 1e-4}, {"temperature": 1e-4}):
        settings = {"temperature": 5.0} | settings
        assert torch.equal(continuation(model, prompt, 30, **settings), best)
    for temperature in (0, 1e-300, 1e-3):
        assert gpt.sample_token(torch.stack([LOGITS, -LOGITS]), temperature).tolist() == [0, 5]
    drawn = continuation(model, prompt, 30, temperature=5.0, seed=1)
    assert torch.equal(drawn, continuation(model, prompt, 30, temperature=5.0, seed=1))
    assert not torch.equal(drawn, continuation(model, prompt, 30, temperature=5.0, seed=2))
    torch.manual_seed(5)
    unseeded = continuation(model, prompt, 30, temperature=5.0)
    torch.manual_seed(5)  # this does not bring it back
    assert not torch.equal(unseeded, continuation(model, prompt, 30, temperature=5.0))


def test_every_row_ends_by_itself():
    """A row that has produced eos goes on with eos; when all rows have, the text is over."""
    model = random_model()
    prompt = random_tokens(3, 2)
    free = continuation(model, prompt, 99, temperature=4.0, seed=3)
    rows = free.tolist()
    eos = max(set(rows[0]) & set(rows[1]) & set(rows[2]))  # a token that all of them have
    ends = [row.index(eos) for row in rows]
    assert len(set(ends)) == 3
    expected = free[:, : max(ends) + 1]
    for row, end in zip(expected, ends, strict=True):
        row[end:] = eos
    assert torch.equal(continuation(model, prompt, 99, temperature=4.0, seed=3, eos=eos), expected)


# ==================================================================================================
# 7 GPT-2 weights


def write_gpt2(folder, config):
    """Write the files of a GPT-2 of this shape; returns {variable: float64 array}."""
    V, context, C, heads, blocks = astuple(config)[:5]
    matrices = {"attn/c_attn": (1, C, 3 * C), "attn/c_proj": (1, C, C)}
    matrices |= {"mlp/c_fc": (1, C, 4 * C), "mlp/c_proj": (1, 4 * C, C)}
    shapes = {"wte": (V, C), "wpe": (context, C), "ln_f/g": (C,), "ln_f/b": (C,)}
    for n in range(blocks):
        for name, shape in matrices.items():
            shapes |= {f"h{n}/{name}/w": shape, f"h{n}/{name}/b": shape[2:]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h{n}/{name}/g": (C,), f"h{n}/{name}/b": (C,)}
    rng = np.random.default_rng(0)
    variables = {}
    with open(folder / DATA, "wb") as file:
        for name in sorted(shapes):  # h0, h1, h10, h11, h2, ...
            numbers = rng.normal(0.0, 0.5, shapes[name]).astype("<f4")
            variables[f"model/{name}"] = numbers.astype(float)
            file.write(numbers.tobytes())
    hparams = {"n_vocab": V, "n_ctx": context, "n_embd": C, "n_head": heads, "n_layer": blocks}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    return variables


def numpy_gpt2(variables, tokens, config):
    """GPT-2 in float64, from the papers' equations and OpenAI's variables: (B, T) -> (B, T, V)."""

    def norm(x, name):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
        return x * variables[f"{name}/g"] + variables[f"{name}/b"]

    def linear(x, name):
        return x @ variables[f"{name}/w"][0] + variables[f"{name}/b"]

    B, T = tokens.shape
    x = variables["model/wte"][tokens] + variables["model/wpe"][:T]
    for n in range(config.n_layer):
        block = f"model/h{n}"
        joint = linear(norm(x, f"{block}/ln_1"), f"{block}/attn/c_attn")  # (B, T, 3C)
        heads = joint.reshape(B, T, 3, config.n_head, -1)
        q, k, v = heads.transpose(2, 0, 3, 1, 4)  # (B, H, T, D) each
        result = numpy_attention(q, k, v)[2].transpose(0, 2, 1, 3)  # (B, T, H, D)
        x = x + linear(result.reshape(x.shape), f"{block}/attn/c_proj")
        u = linear(norm(x, f"{block}/ln_2"), f"{block}/mlp/c_fc")
        gelu = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        x = x + linear(gelu, f"{block}/mlp/c_proj")
    return norm(x, "model/ln_f") @ variables["model/wte"].T


@both_arithmetics
@three_shapes
def test_openais_weights_give_openais_logits(config, fused, tmp_path):
    """Every logit of the loaded model is that of the equations in float64."""
    variables = write_gpt2(tmp_path, config)
    model = gpt.load_gpt2(tmp_path, fused=fused)
    assert model.config == replace(config, fused=fused)
    tokens = random_tokens(2, config.context_length, below=config.vocab_size)
    expected = numpy_gpt2(variables, tokens.numpy(), config)
    assert_close(model(tokens), expected, 1e-5)
    assert_close(model(tokens, last_only=True), expected[:, -1:], 1e-5)
    assert_close(model.double()(tokens), expected, 1e-12)


def test_the_weights_are_views_of_the_mapped_file(tmp_path):
    """Nothing is copied and nothing is written, not even if a parameter is changed.
    OpenAI's matrices lie column by column then, until place() lays them row by row."""
    write_gpt2(tmp_path, DEEP)
    before = (tmp_path / DATA).read_bytes()
    model = gpt.load_gpt2(tmp_path)
    assert not model.training
    assert len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()}) == 1
    maps = Path("/proc/self/maps")  # on Linux: what files a process has mapped
    assert not maps.exists() or str(tmp_path / DATA) in maps.read_text()
    torch.nn.init.zeros_(model.token_embedding)
    assert (tmp_path / DATA).read_bytes() == before
    gpt.place(model, "cpu", torch.float16)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_a_wrong_file_is_refused(tmp_path):
    """The message has the length that was found and the one that the shapes give, or the name."""
    length = 4 * sum(variable.size for variable in write_gpt2(tmp_path, DEEP).values())
    for wrong in (length + 4, length - 4):
        os.truncate(tmp_path / DATA, wrong)
        with pytest.raises(gpt.UserError, match=f"{wrong:,} bytes, not {length:,}"):
            gpt.load_gpt2(tmp_path)
    for damaged in ("", '{"n_vocab": 23', "{}", "[]", "<html>"):
        (tmp_path / "hparams.json").write_text(damaged)
        with pytest.raises(gpt.UserError, match="hparams.json"):
            gpt.load_gpt2(tmp_path)


@pytest.fixture
def by_tensorflow(tmp_path):
    """A folder in which TensorFlow's Saver wrote the variables of NumPy's file, now by_numpy."""
    v1 = pytest.importorskip("tensorflow").compat.v1
    variables = write_gpt2(tmp_path, DEEP)
    (tmp_path / DATA).rename(tmp_path / "by_numpy")
    with v1.Graph().as_default(), v1.Session() as session:
        for name in reversed(variables):
            v1.get_variable(name, initializer=variables[name].astype(np.float32))
        session.run(v1.global_variables_initializer())
        v1.train.Saver().save(session, str(tmp_path / "model.ckpt"), write_meta_graph=False)
    return tmp_path


def test_tensorflow_writes_the_same_bytes(by_tensorflow):
    """So the files that NumPy writes here have OpenAI's layout."""
    assert (by_tensorflow / DATA).read_bytes() == (by_tensorflow / "by_numpy").read_bytes()


def test_tensorflow_reads_the_same_parameters(by_tensorflow):
    """Every variable that its reader finds is a parameter of load_gpt2()'s model, or three."""
    train = pytest.importorskip("tensorflow").train
    model = gpt.load_gpt2(by_tensorflow)
    ours = {"wte": model.token_embedding, "wpe": model.position_embedding}
    norms = {"ln_f": model.final_norm}
    linears = {}
    for n, block in enumerate(model.blocks):
        norms |= {f"h{n}/ln_1": block.norm_1, f"h{n}/ln_2": block.norm_2}
        attention = block.attention
        linears[f"h{n}/attn/c_attn"] = [attention.query, attention.key, attention.value]
        linears[f"h{n}/attn/c_proj"] = [attention.projection]
        linears[f"h{n}/mlp/c_fc"] = [block.feed_forward.expand]
        linears[f"h{n}/mlp/c_proj"] = [block.feed_forward.projection]
    for name, norm in norms.items():
        ours |= {f"{name}/g": norm.weight, f"{name}/b": norm.bias}
    for name, layers in linears.items():  # query, key and value side by side
        ours[f"{name}/w"] = torch.cat([layer.weight.T for layer in layers], dim=1)[None]
        ours[f"{name}/b"] = torch.cat([layer.bias for layer in layers])
    theirs = train.load_checkpoint(str(by_tensorflow / "model.ckpt"))
    assert theirs.get_variable_to_shape_map().keys() == {f"model/{name}" for name in ours}
    for name, parameter in ours.items():
        assert np.array_equal(parameter.detach(), theirs.get_tensor(f"model/{name}")), name


# What is known of the real GPT-2 124M. The same check runs on a stand-in, which NumPy knows.
REAL = Path(gpt.__file__).parent / "gpt2" / "124M"
CITIZENS = """First Citizen:/Before we proceed any further, hear me speak.//All:/Speak,
speak.//First Citizen:/You are all resolved rather to die than to famish?//All:/Resolved.
resolved.//First Citizen:/First, you know Caius Marcius is chief enemy to the people.//All:/We
know't, we know't.//First Citizen:/Let us kill him, and we'll have corn at our own price./Is't a
verdict?//All:/No more talking on't; let it be done: away, away!//Second Citizen:/One word, good
citizens.//First Citizen:/We are accounted poor citizens, the patricians good./What authority
surfeits on would relieve us: if they/would yield us but the superfluity, while it were/wholesome,
we might guess they relieved us humanely;/but they think we are too dear: the leanness
that/afflicts us, the object of our misery, is as an/inventory to particularise their abundance;
our/sufferance is a gain to them Let us revenge this with/our p"""


def shakespeare(vocabulary):
    """The first 257 tokens of llm.c's Tiny Shakespeare: <|endoftext|> precedes each paragraph."""
    paragraphs = CITIZENS.replace("\n", " ").replace("/", "\n").split("\n\n")
    text = "<|endoftext|>" + "\n\n<|endoftext|>".join(paragraphs)
    return vocabulary.encode(text, allowed_special="all")


def check_known_outputs(model, texts, logits, mean, loss, losses):
    """What a model is known to do: greedy texts, logits at the last position, the mean of all
    logits, a loss, and the losses of AdamW's steps on one batch, within a 500th of their fall."""
    for prompt, text in texts:
        said = continuation(model, torch.tensor([prompt]), len(text), temperature=0)
        assert said[0].tolist() == text
    tokens, expected = logits
    found = model(torch.tensor([tokens]))[0, -1, list(expected)]
    assert found.tolist() == pytest.approx(list(expected.values()), abs=1e-3)
    tokens, expected = mean
    assert model(torch.tensor([tokens])).mean().item() == pytest.approx(expected, rel=1e-4)
    tokens, expected = loss
    found = gpt.cross_entropy(model(torch.tensor([tokens[:-1]])), torch.tensor([tokens[1:]]))
    assert found.item() == pytest.approx(expected, abs=4e-5)
    tokens, expected = losses
    inputs = torch.tensor(tokens[:-1]).view(4, -1)
    targets = torch.tensor(tokens[1:]).view(4, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    found = []
    for _ in expected:
        batch_loss = gpt.cross_entropy(model(inputs), targets)
        batch_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(batch_loss.item())
    assert found == pytest.approx(expected, abs=(expected[0] - expected[-1]) / 500)


def numpy_adamw(loss, parameters, steps):
    """The losses before each step of AdamW, by its formulas; a gradient is a measured growth."""
    moves = 1e-6 * np.eye(len(parameters))
    mean = square = 0.0
    losses = []
    for step in range(1, steps + 1):
        losses.append(loss(parameters))
        gradient = np.array([loss(parameters + h) - loss(parameters - h) for h in moves]) / 2e-6
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        change = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        parameters = parameters - 1e-4 * (change + 0.01 * parameters)
    return losses


def test_the_check_of_known_outputs_holds_for_the_stand_in(tmp_path):
    """Text, logits, losses and ten steps of learning are as NumPy computes them."""
    config = gpt.GPTConfig(vocab_size=5, context_length=8, n_embd=4, n_head=2, n_layer=1)
    variables = write_gpt2(tmp_path, config)
    tokens = random_tokens(9, below=5).tolist()
    rows = np.array(tokens[:8]).reshape(4, 2)
    targets = np.array(tokens[1:])
    logits = numpy_gpt2(variables, np.array([tokens[:8]]), config)[0]  # (T, V)

    def batch_loss(parameters):  # in the order of the file
        start = 0
        moved = {}
        for name, variable in variables.items():
            moved[name] = parameters[start : start + variable.size].reshape(variable.shape)
            start += variable.size
        return numpy_loss(numpy_gpt2(moved, rows, config), targets.reshape(4, 2))

    losses = numpy_adamw(batch_loss, np.fromfile(tmp_path / DATA, "<f4").astype(float), steps=10)
    check_known_outputs(
        gpt.load_gpt2(tmp_path),
        texts=[(tokens[:T], [int(logits[T - 1].argmax())]) for T in range(1, 9)],
        logits=(tokens[:8], dict(enumerate(logits[7]))),
        mean=(tokens[:8], logits.mean()),
        loss=(tokens, numpy_loss(logits, targets)),
        losses=(tokens, losses),
    )


def test_the_known_tokens_of_shakespeare(vocabulary):
    """They are those that llm.c's losses were measured on, by their SHA-256."""
    tokens = np.array(shakespeare(vocabulary), dtype="<u2")
    digest = "f3cb1f678d40cf5a120662b12a20fdacc5bd2e08c13ebb230a93e9f6f82f1df4"
    assert hashlib.sha256(tokens.tobytes()).hexdigest() == digest


@pytest.mark.skipif(not (REAL / DATA).exists(), reason="OpenAI's 124M is not in gpt2/124M")
def test_the_real_gpt2_gives_its_known_outputs(vocabulary):
    """The file's SHA-256; texts, logits and losses that others have published."""
    with open(REAL / DATA, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert digest == "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118"
    turing = "Alan Turing theorized that computers would one day become"
    field = " was found in a field near the intersection of West and West Streets.\n\nThe dog"
    texts = [  # from picoGPT's README and the tests of transformers
        (turing, " the most powerful machines on the planet."),
        ("The dog", field),
        ("Today, I", "'m going to be doing a lot of research on this. I"),
        ("Hello, my dog is a little", " bit of a mess. I'm not sure if he's going"),
    ]
    logits = [-35.23624420, -35.32659531, -38.97534943, -39.39067459]
    logits += [-37.65318298, -38.67243576, -36.02489090, -36.48415375]
    logits = dict(enumerate(logits)) | {10000: -41.98722839, 50000: -44.11378098}
    losses = [5.270007, 4.059707, 3.375123, 2.800783, 2.315382]
    losses += [1.849029, 1.394656, 0.999147, 0.624080, 0.376511]
    hello = vocabulary.encode("<|endoftext|>Hello world!", allowed_special="all")
    check_known_outputs(
        gpt.load_gpt2(REAL),
        texts=[vocabulary.encode_batch(list(pair)) for pair in texts],
        logits=([15496], logits),  # an ONNX reference, as is the next
        mean=([15496, 11, 314, 716], -111.89471436),
        loss=(hello, 5.331855773925781),  # TransformerLens
        losses=(shakespeare(vocabulary), losses),  # llm.c, test_gpt2.c
    )


# ==================================================================================================
# 8 Plumbing


@pytest.mark.parametrize("columns", [0, 40, None], ids=["unknown width", "40 columns", "a file"])
def test_progress_fits_the_terminal_and_a_file_gets_only_what_stays(columns, monkeypatch):
    """The first and last step, validations, checkpoints stay; what is overwritten ends in \\r."""
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((columns, 24)))
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    sys.stderr.isatty = lambda: columns is not None
    gpt.main(f"{TRAIN} --steps 5 --eval-every 3 --save-every 4".split())
    shown = sys.stderr.getvalue()
    assert re.findall(r"step (\d)/5[^\r\n]*\n", shown) == ["1", "3", "4", "5"]
    brief = re.findall("([^\r\n]*)\r", shown)
    assert [line[:8] for line in brief] == ([] if columns is None else ["step 2/5"])
    assert {len(line) for line in brief} <= {(columns or 80) - 1}


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(monkeypatch):
    """Written beside, fsync, then renamed: a power cut can't leave an empty file of that name."""
    calls = Mock()
    monkeypatch.setattr(os, "fsync", calls.fsync)
    monkeypatch.setattr(os, "replace", calls.replace)
    save_reciter("naïve")
    assert [name for name, _, _ in calls.mock_calls] == ["fsync", "replace"]
    assert not Path("model.pt").exists(), "nothing but os.replace gives it this name"


@linux_only
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint():
    """A dozen runs that save in every step are killed: what is there loads, and never goes back."""
    command = f"{TRAIN} --steps 1000000 --save-every 1 --eval-every 1"
    steps = []
    for _ in range(12):
        fork(command, rows=len(log()) + 2)
        steps.append(training_state()["step"])
        assert steps[-1] <= len(log()) and len(weights("out/best.pt"))
        command = RESUME
    assert steps == sorted(steps)


@pytest.mark.parametrize("limit", [20_000, 50_000])  # PyTorch fails, or the closing of the file
def test_a_full_disk_ends_the_run_and_nothing_else(limit, capsys):
    """One line; the previous checkpoint is what it was, nothing lies beside it, and it goes on."""
    resource = pytest.importorskip("resource")
    run(capsys, f"{TRAIN} --val-fraction 0")
    before = LAST.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        line = refusal(capsys, f"{RESUME} --steps 4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "can't write out/checkpoint.pt" in line
    assert LAST.read_bytes() == before and set(os.listdir("out")) == {"checkpoint.pt", "log.csv"}
    run(capsys, f"{RESUME} --steps 4")


def test_a_checkpoint_is_mapped_for_sampling_and_read_for_training(capsys, monkeypatch):
    """Windows can't replace a file that is mapped, as a resumed run does with its checkpoint."""
    run(capsys, TRAIN)
    monkeypatch.setattr(torch, "load", Mock(wraps=torch.load))
    run(capsys, "sample --tokens 1")
    run(capsys, f"{RESUME} --steps 3")
    assert [call.kwargs["mmap"] for call in torch.load.call_args_list] == [True, False]


def test_a_flipped_bit_is_noticed_or_does_no_harm():
    """Anywhere in the file: it is refused, or (in the archive's padding) loads to what was saved,
    the same weights to the bit, the same shape, the same tokens."""

    def content(model, tokenizer, state):
        numbers = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
        tokens = tokenizer.encode("the naïve ☕<|endoftext|>", allowed_special="all")
        return numbers.tobytes(), model.config, tokens, tokenizer.decode(tokens), state

    config = gpt.GPTConfig(280, context_length=8, n_embd=8, n_head=2, n_layer=1, fused=False)
    saved = gpt.GPT(config), gpt.load_tokenizer(280, LESSON), {"step": 3}
    gpt.save_checkpoint("model.pt", *saved)
    data = Path("model.pt").read_bytes()
    assert content(*gpt.load_checkpoint("model.pt")) == content(*saved)
    refused = 0
    for place in [*range(0, len(data), 211), *range(64), *range(len(data) - 64, len(data))]:
        flipped = bytes([data[place] ^ 1 << place % 8])
        Path("model.pt").write_bytes(data[:place] + flipped + data[place + 1 :])
        try:
            assert content(*gpt.load_checkpoint("model.pt")) == content(*saved), place
        except gpt.UserError:
            refused += 1
    assert refused > 100


def test_a_file_that_is_no_checkpoint_is_refused(capsys):
    """One line with its name; code in it isn't run."""

    class Bomb:
        def __reduce__(self):
            return open, ("bang", "w")  # so unpickling it makes a file

    save_reciter("naïve")
    whole = Path("model.pt").read_bytes()
    good = torch.load("model.pt")
    files = [b"", whole[: len(whole) // 2], whole[:-1], b"I HAD always"]
    objects = [{"model": torch.ones(3)}, [1, 2], {"format": Bomb()}, {"format": good["format"]}]
    for wrong in [*objects, good | {"format": 999}, good | {"weights": {}}]:
        torch.save(wrong, "wrong.pt")
        files.append(Path("wrong.pt").read_bytes())
    for file in files:
        Path("wrong.pt").write_bytes(file)
        assert "wrong.pt" in refusal(capsys, "sample --checkpoint wrong.pt")
    assert not Path("bang").exists()


@pytest.fixture
def mirror(folder):
    """The address of a server of the folder server/, with the two files of a very small GPT-2."""
    hparams = {"n_vocab": 50257, "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 1}
    model = gpt.GPT(gpt.GPTConfig(*hparams.values()))
    numbers = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    Path("server/124M").mkdir(parents=True)
    Path("server/124M", HPARAMS).write_text(json.dumps(hparams))
    numbers.tofile(Path("server/124M", DATA))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory="server")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_gpt2_is_downloaded_once_sampled_from_and_trained_on(mirror, vocabulary, capsys):
    """sample --gpt2 fetches both files from the address; later no server is needed.
    train --gpt2 starts from their weights; --context shortens the windows alone."""
    command = "sample --gpt2 124M --tokens 3 --ignore-eos --gpt2-url"
    first = run(capsys, f"{command} {mirror}")
    assert "3 tokens in" in first.err and set(os.listdir("gpt2/124M")) == {HPARAMS, DATA}
    assert run(capsys, f"{command} nowhere").out == first.out
    tune = f"train --gpt2 124M --data lesson.txt --context 8 {PACE} --steps 1 --learning-rate 0"
    assert " windows of 8\n" in run(capsys, tune).err
    openais = gpt.place(gpt.load_gpt2("server/124M"), "cpu", torch.float32)
    assert gpt.load_checkpoint(LAST)[0].config == openais.config
    assert torch.equal(weights(), torch.nn.utils.parameters_to_vector(openais.parameters()))


def test_a_download_that_goes_wrong_is_one_line(mirror, capsys, monkeypatch):
    """The line has the address. Nothing is kept, and when the server is right, the next try is."""
    monkeypatch.setattr(gpt, "load_tokenizer", lambda name: None)  # it isn't what is tested here
    for address in (f"{mirror}/missing", f"{mirror}/a b", "nowhere", "http://127.0.0.1:9"):
        assert address in refusal(capsys, f"sample --gpt2 124M --gpt2-url '{address}'")
    for name, content in ((HPARAMS, b"{}"), (HPARAMS, b"<html>"), (DATA, b"page")):
        whole = Path("server/124M", name).read_bytes()
        Path("server/124M", name).write_bytes(content)
        assert f"{mirror}/124M" in refusal(capsys, f"sample --gpt2 124M --gpt2-url {mirror}")
        Path("server/124M", name).write_bytes(whole)
    assert os.listdir("gpt2/124M") == []
    gpt.download_gpt2("124M", "gpt2/124M", mirror)
    assert set(os.listdir("gpt2/124M")) == {HPARAMS, DATA}


@pytest.mark.parametrize("modern", [False, True], ids=["T4", "A100"])
def test_the_accelerator_decides_the_dtype(modern, monkeypatch):
    """A GPU without bfloat16 in hardware trains in float16; every GPU samples in float16."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)

    def is_bf16_supported(including_emulation=True):
        return modern or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    options = SimpleNamespace(device="auto", dtype="auto", command="train")
    assert gpt.choose_device(options) == (cuda, torch.bfloat16 if modern else torch.float16)
    save_reciter("naïve")
    monkeypatch.setattr(gpt, "place", Mock())  # its model stays on the CPU
    gpt.main(["sample", "--checkpoint", "model.pt", "--tokens", "1"])
    assert gpt.place.call_args.args[1:] == (cuda, torch.float16)


def test_a_cpu_multiplies_quickly_but_never_rounds(monkeypatch):
    """oneDNN may be used; on a processor that rounds then, the setting is what it was before."""
    products = torch.backends.mkldnn.matmul
    for rounds, expected in ((False, "bf16"), (True, "ieee")):
        products.fp32_precision = "ieee"
        with monkeypatch.context() as patch:
            patch.setattr(torch, "equal", Mock(return_value=not rounds))  # it compares products
            gpt.set_up_cpu()
        assert products.fp32_precision == expected
    gpt.set_up_cpu()  # now for the processor that is here
    x = torch.randn(300, 300, dtype=torch.float64)
    torch.testing.assert_close((x.float() @ x.float()).double(), x @ x, rtol=0, atol=1e-3)


def test_a_resumed_run_may_change_what_does_not_fix_the_model(capsys):
    """Steps, rate, intervals, dtype, another cut of the batch, the places of data and run."""
    run(capsys, f"{TRAIN} --out old")
    before = log("old")
    os.rename("lesson.txt", "moved.txt")
    os.rename("old", "out")
    assert "lesson.txt" in refusal(capsys, f"{RESUME} --steps 5")
    changes = "--steps 5 --learning-rate 1e-9 --save-every 2 --eval-every 2 --batch-size 2"
    changes += " --accumulate 2 --dtype bfloat16 --data moved.txt"
    printed = run(capsys, f"{RESUME} {changes}")
    assert printed.out.count("Hey") == 2, "a sample with each checkpoint, after steps 4 and 5"
    assert set(os.listdir()) == {"moved.txt", "out"}
    rows = log()
    assert [row["step"] for row in rows] == list("12345")
    assert [row["step"] for row in rows if row["val_loss"]] == ["2", "4", "5"]
    assert rows[:2] == before and float(rows[-1]["learning_rate"]) <= 1e-9


def test_a_resumed_run_keeps_what_fixes_the_model(capsys):
    """The line names the option, or has both numbers of what has to stay or can't go back.
    Without --resume the run isn't touched: the line tells to go on, or to write elsewhere."""
    run(capsys, TRAIN)
    before = {file.name: file.read_bytes() for file in Path("out").iterdir()}
    assert before.keys() == {"checkpoint.pt", "best.pt", "log.csv"}
    fixed = "--size=124M --gpt2=124M --tokenizer=300 --context=8 --n-layer=2 --n-head=1 --seed=2"
    fixed += " --n-embd=64 --dropout=0.5 --from-scratch --gpt2-folder=x --gpt2-url=x"
    for option in fixed.split():
        name = option[2:].partition("=")[0].replace("-", "_")
        assert name in refusal(capsys, f"{RESUME} --steps 9 {option}")
    numbers = {"--batch-size 3": "3.* 4", "--accumulate 2": "8.* 4", "--steps 1": "1.* 2"}
    for option, expected in numbers.items():
        assert re.search(f" {expected}", refusal(capsys, f"{RESUME} {option}"))
    assert re.search("checkpoint.pt.*--resume.*--out", refusal(capsys, TRAIN))
    assert {file.name: file.read_bytes() for file in Path("out").iterdir()} == before
    LAST.unlink()
    assert re.search("best.pt.*move.*--out", refusal(capsys, TRAIN))
    os.replace("out/best.pt", LAST)  # a model without the state of a run
    assert "checkpoint.pt" in refusal(capsys, RESUME)


def save_reciter(text):
    """Save, as model.pt, a GPT that writes the n-th byte of the text at position n, whatever it
    reads: its blocks add nothing, and each position points at the token that is to come."""
    tokenizer = gpt.load_tokenizer(257, text)  # a token for each byte, and <|endoftext|>
    tokens = tokenizer.encode(text, allowed_special="all")
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(257, len(tokens), n_embd=64, n_head=1, n_layer=1))
    directions = torch.nn.functional.normalize(torch.randn(257, 64))
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        model.token_embedding.copy_(directions)
        model.position_embedding.copy_(100 * directions[torch.tensor(tokens)])
    gpt.save_checkpoint("model.pt", model, tokenizer)


def test_the_text_goes_to_standard_output_and_the_figures_to_standard_error(capsys):
    """The figures are tokens, seconds and tokens per second. Several samples have headers, and
    seeds of their own: sample 2 of seed 7 is what seed 8 gives."""
    save_reciter("naïve ☕☕☕")
    printed = run(capsys, f"{RECITE} --dtype float16 --tokens 43")
    assert printed.out == "Anaïve " + 12 * "☕" + "\n"
    assert re.fullmatch(r"43 tokens in [\d.]+ s: [\d.]+ tokens per second\n", printed.err)
    wild = f"{RECITE} --temperature 1e5 --top-k 257 --tokens 20 --ignore-eos"
    both = run(capsys, f"{wild} --samples 2 --seed 7").out
    one, other = (run(capsys, f"{wild} --seed {seed}").out for seed in (7, 8))
    assert both == f"--- sample 1 ---\n{one}--- sample 2 ---\n{other}" and one != other


def test_a_sample_has_any_prompt_and_stops_at_the_end_of_text(capsys, monkeypatch):
    """<|endoftext|> isn't printed; with --ignore-eos the sample goes on behind it.
    The prompt - is standard input, all of it, in UTF-8 whatever the system's code page."""
    save_reciter("one<|endoftext|>two")
    assert run(capsys, f"{RECITE} --prompt '<|endoftext|>'").out == "<|endoftext|>one\n"
    assert run(capsys, f"{RECITE} --tokens 7 --ignore-eos").out == "Aone<|endoftext|>two\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("é\n☕".encode()), "latin-1"))
    assert run(capsys, f"{RECITE} --prompt - --tokens 1").out == "é\n☕w\n"
    for prompt in ("", "\n", "naïve \x00 日本語", "<|endoftext|>", "word " * 99):
        assert run(capsys, f"{RECITE} --tokens 5 --prompt", prompt).out.startswith(prompt)


def test_text_streams_in_whole_characters_and_a_closed_pipe_is_no_error(monkeypatch):
    """UTF-8 comes as it is made, whatever the code page; when nobody reads on, the sample ends."""
    save_reciter("naïve ☕☕☕")
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    command = [sys.executable, HERE / "gpt.py", *RECITE.split(), "--tokens", "1000000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pieces = []
    while sum(len(piece) for piece in pieces) < 100:
        pieces.append(os.read(process.stdout.fileno(), 65536))
        assert pieces[-1], "it has ended"
    assert "".join(piece.decode("utf-8") for piece in pieces).startswith("Anaïve ☕☕☕☕")
    assert max(len(piece) for piece in pieces) < 4096, "a buffer of 8 KB was filled first"
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == b""


def test_help_has_groups_and_fits_80_columns(capsys, monkeypatch):
    """And it is no mistake."""
    monkeypatch.setenv("COLUMNS", "80")
    groups = {"train": "data model training output GPT-2 other", "sample": "text GPT-2 other"}
    for command, names in groups.items():
        with pytest.raises(SystemExit, match="0"):
            gpt.main([command, "--help"])
        text = capsys.readouterr().out
        assert re.findall(r"^([\w-]+):$", text, re.MULTILINE) == ["options", *names.split()]
        assert max(len(line) for line in text.splitlines()) <= 80


WRONG = {  # options: what they can't be
    "train steps batch-size accumulate stride context eval-every save-every": "0 -1 1.5 nan",
    "train n-layer n-head n-embd": "0 -1 1.5 nan",
    "train warmup seed": "-1 0.5 inf",
    "train val-fraction dropout": "-0.1 1 nan",
    "train learning-rate weight-decay clip": "-1 nan inf",
    "train size device dtype gpt2": "huge",
    "sample tokens top-k samples": "-1 0 0.5 nan x",
    "sample temperature": "-1 nan inf",
    "sample top-p": "-0.1 0 1.1 nan",
}
ABSENT = "mps" if torch.cuda.is_available() else "cuda"
MISTAKES = {  # the command: what its line has to name, a regular expression
    "trian": "trian",
    "train --step 5": "--step",
    f"{TRAIN} --device {ABSENT}": f"{ABSENT}.*cpu",
    f"{TRAIN} --tokenizer bpe": "bpe.*gpt2",
    f"{TRAIN} --tokenizer 256": r"\b256\b",
    f"{TRAIN} --n-head 3": "n_embd 32.*n_head 3",
    f"{TRAIN} --n-embd {10**18}": "memory",
    f"{TRAIN} --data missing.txt": "missing.txt",
    f"{TRAIN} --data latin": "latin.*UTF-8",
    f"{TRAIN} --data short": r"short.*\b1\b.*\b17\b",
    f"{TRAIN} --data 2.bin": "tokenizer.*280",
    f"{TRAIN} --data 1.bin": "1.bin.*two bytes",
    "train --gpt2 124M --size 355M": "--gpt2.*--size",
    "train --gpt2 124M --n-layer 2": "--gpt2.*--n-layer",
    "train --gpt2 124M --tokenizer 300": "--gpt2.*--tokenizer",
    "train --resume --out nowhere": "nowhere.checkpoint.pt",
    "sample --checkpoint missing.pt": "missing.pt",
    "sample --checkpoint x.pt --gpt2 124M": "--gpt2.*--checkpoint",
}
for words, values in WRONG.items():
    command, *names = words.split()
    for name, value in itertools.product(names, values.split()):
        MISTAKES[f"{command} --{name}={value}"] = rf"--{name}\b.*{re.escape(value)}"


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_was_given(command, capsys):
    """`gpt.py: error: ...`, status 2, no traceback; nothing is written."""
    for name, content in (("latin", b"\xef"), ("short", b"!"), ("1.bin", b"!"), ("2.bin", b"!!")):
        Path(name).write_bytes(content)
    before = sorted(os.listdir())
    line = refusal(capsys, command)
    assert re.search(MISTAKES[command], line), line
    assert sorted(os.listdir()) == before


def test_what_ends_a_run_is_one_line_unless_it_is_a_bug(capsys, monkeypatch):
    """Ctrl-C ends with status 130, and nothing is saved. Who lacks memory is told what to do.
    A bug keeps its traceback: who edits gpt.py has to see where it failed."""
    monkeypatch.setattr(gpt, "cross_entropy", Mock(side_effect=KeyboardInterrupt))
    assert re.search("stopped.*--resume", refusal(capsys, TRAIN, status=130))
    assert os.listdir("out") == ["log.csv"]
    for error in (MemoryError(), RuntimeError("not enough memory"), RuntimeError("out of memory")):
        gpt.cross_entropy.side_effect = error
        assert re.search(f"{error}.*smaller model", refusal(capsys, TRAIN))
    for error in (ZeroDivisionError("bug"), RuntimeError("bug"), ValueError("bug")):
        gpt.cross_entropy.side_effect = error
        with pytest.raises(type(error), match="bug"):
            run(capsys, TRAIN)
    save_reciter("naïve")
    monkeypatch.setattr(gpt.GPT, "__init__", Mock(side_effect=RuntimeError("bug")))
    with pytest.raises(RuntimeError, match="bug"):
        run(capsys, RECITE)


def test_training_works_in_a_thread():
    """Also in one that isn't the main one, as in a notebook."""
    thread = threading.Thread(target=gpt.main, args=(TRAIN.split(),))
    thread.start()
    thread.join()
    assert training_state()["step"] == 2


def test_gpt_py_needs_no_docstrings_and_no_tensorflow():
    """It runs under python -OO, which strips the docstrings, and where TensorFlow is missing."""
    save_reciter("naïve")
    code = f"import sys; sys.modules['tensorflow'] = None; import gpt; gpt.main({RECITE.split()})"
    assert python("-OO", "-c", code)[0].startswith("Anaïve")
