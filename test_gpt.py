"""What is true of a GPT, in the order of gpt.py. Each test states a fact and checks it.

Every fact is known in a second way: from a formula in NumPy and float64, from counted frequencies,
from a computation that is repeated without the cache, or from TensorFlow. The numbers in gpt.py's
worked examples are read from its text and checked, too. No test uses the network. What needs
GPT-2's vocabulary or OpenAI's weights is skipped where they are not at hand.

    python -m pytest -q
"""

import csv
import dataclasses
import functools
import hashlib
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow shall be silent
for protocol in ("http_proxy", "https_proxy"):  # no proxy is there: the network fails at once
    os.environ[protocol] = "http://127.0.0.1:9"
os.environ["no_proxy"] = "127.0.0.1"

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F

import gpt

torch.set_num_threads(1)  # these models are too small to be shared by several cores

HERE = Path(gpt.__file__).parent
SOURCE = Path(gpt.__file__).read_text(encoding="utf-8")
TINY = gpt.GPTConfig(vocab_size=61, context_length=12, n_embd=24, n_head=3, n_layer=2)
SHAPES = {
    "3 heads": TINY,
    "1 head": gpt.GPTConfig(vocab_size=300, context_length=7, n_embd=8, n_head=1, n_layer=1),
    "5 heads": gpt.GPTConfig(vocab_size=61, context_length=16, n_embd=30, n_head=5, n_layer=3),
}
several_shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
both_arithmetics = pytest.mark.parametrize("fused", [True, False], ids=["fused", "by hand"])


def random_model(config=TINY, **changes):
    """A GPT, not in training, whose parameters have left their first values: no bias is 0."""
    torch.manual_seed(0)
    model = gpt.GPT(dataclasses.replace(config, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def random_tokens(*shape, below=TINY.vocab_size):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(1))


def reciter(tokens, vocab_size):
    """A GPT that says tokens[p] at position p, whatever it has read.
    Its blocks add nothing to the stream, and each position points at the token to be said."""
    torch.manual_seed(0)
    config = gpt.GPTConfig(vocab_size, context_length=len(tokens), n_embd=64, n_head=1, n_layer=1)
    model = gpt.GPT(config).eval()
    directions = F.normalize(torch.randn(vocab_size, 64))
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        model.token_embedding.copy_(directions)
        model.position_embedding.copy_(100 * directions[torch.tensor(tokens)])
    return model


def continuation(model, prompt, count, **settings):
    """All that generate yields, side by side: (B, count)."""
    return torch.stack(list(gpt.generate(model, prompt, count, **settings)), dim=1)


def softmax(x):
    """In NumPy, over the last axis."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def assert_close(actual, expected, tolerance):
    """No number differs by more than the tolerance times the largest number that is expected."""
    actual = torch.as_tensor(actual).detach().numpy()
    expected = torch.as_tensor(expected).detach().numpy()
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


Namespace = types.SimpleNamespace
LESSON = "The quick brown fox jumps over the lazy dog. " * 12
SHAPE = "--context 16 --n-layer 1 --n-head 2 --n-embd 32 --batch-size 4 --device cpu"
SMALL = f"{SHAPE} --tokenizer 280"


def run(capsys, *arguments):
    """What `python gpt.py ARGUMENTS` writes to standard output (.out) and standard error (.err)."""
    capsys.readouterr()
    gpt.main([str(argument) for argument in arguments])
    return capsys.readouterr()


def refusal(capsys, *arguments):
    """The last line on standard error, `gpt.py: error: ...`, of a command that ends in status 2."""
    with pytest.raises(SystemExit) as ending:
        run(capsys, *arguments)
    assert ending.value.code == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("gpt.py: error: ") and "Traceback" not in error
    return error.splitlines()[-1]


def start(*command, **environment):
    """`python COMMAND` in a process of its own, with pipes for what it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""} | environment
    command = [sys.executable, *(str(argument) for argument in command)]
    return subprocess.Popen(
        command, cwd=HERE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process):
    """(status, standard output, standard error) of a process that ends by itself."""
    try:
        output, error = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, output.decode("utf-8"), error.decode("utf-8")


def wait_for(condition, is_alive):
    """Return as soon as the condition holds, which it must within a minute of a live process."""
    deadline = time.monotonic() + 60
    while not condition():
        assert is_alive() and time.monotonic() < deadline
        time.sleep(0.002)


def log(out):
    """The rows of log.csv as dicts, without the speed, which no two runs share."""
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: row[name] for name in row if name != "tokens_per_second"} for row in rows]


def count_rows(out):
    return len(log(out)) if (out / "log.csv").exists() else 0


def losses(out):
    return np.array([float(row["train_loss"]) for row in log(out)])


def weights(path):
    return gpt.load_checkpoint(path)[0].state_dict()


def training_state(out):
    return gpt.load_checkpoint(out / "checkpoint.pt")[2]


def first_means(out):
    """AdamW's running means of the gradients, of all parameters side by side."""
    means = training_state(out)["optimizer"]
    return torch.cat([means[number]["exp_avg"].flatten() for number in sorted(means)])


def names(folder):
    return {file.name for file in folder.iterdir()}


@pytest.fixture
def lesson(tmp_path):
    """The command that trains a very small GPT on one sentence, into tmp_path/out."""
    (tmp_path / "lesson.txt").write_text(LESSON)
    return ["train", "--data", tmp_path / "lesson.txt", "--out", tmp_path / "out", *SMALL.split()]


@pytest.fixture
def begun(lesson, tmp_path, capsys):
    """The folder of such a run after two steps of three."""
    run(capsys, *lesson, "--steps", 2, "--warmup", 1)
    return tmp_path / "out"


@pytest.fixture
def vocabulary():
    """GPT-2's tokenizer, where tiktoken has it or can get it."""
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:
        pytest.skip(f"tiktoken can't get GPT-2's vocabulary: {error}")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A machine on which tiktoken has never got GPT-2's vocabulary, and can't get it."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})


# ==================================================================================================
# 1 Config


SIZES = {"124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200}


@pytest.mark.parametrize("size", SIZES)
def test_gpt2_has_the_published_number_of_parameters(size):
    """OpenAI's four models differ in C, H and blocks; the tied output head has none of its own."""
    config = gpt.GPT2_CONFIGS[size]
    assert (config.vocab_size, config.context_length) == (50257, 1024)
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
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-11), ("float16", 2e-3)])
def test_layernorm_brings_each_token_to_mean_0_and_variance_1(dtype, tolerance, fused):
    """(x - mean) / sqrt(variance + 1e-5) * weight + bias, over C; variance divides by C.
    In float16, which ends at 65,504, the squares of numbers around 1,000 must not overflow."""
    layer = gpt.LayerNorm(dataclasses.replace(TINY, fused=fused)).to(getattr(torch, dtype))
    rng = np.random.default_rng(0)
    spread = 0.02 if dtype == "float64" else 1000  # the 1e-5 matters, or the squares are large
    x, weight, bias = (rng.normal(2, s, size=(5, 24)).astype(dtype) for s in (spread, 1, 1))
    layer.load_state_dict({"weight": torch.tensor(weight[0]), "bias": torch.tensor(bias[0])})
    y = layer(torch.tensor(x))
    assert y.dtype == getattr(torch, dtype)
    x, weight, bias = (numbers.astype(float) for numbers in (x, weight[0], bias[0]))
    deviation = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    assert_close(y, (x - x.mean(axis=-1, keepdims=True)) / deviation * weight + bias, tolerance)


@both_arithmetics
def test_gelu_is_gpt2s_formula_with_tanh(fused):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x³))): near the exact GELU, but not the same."""
    layer = gpt.GELU(dataclasses.replace(TINY, fused=fused))
    x = np.linspace(-6, 6, 121)
    expected = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    assert_close(layer(torch.tensor(x)), expected, 1e-13)


def numpy_attention(q, k, v):
    """(scores, weights, result) by the formula: token S - T + i has query i and sees up to itself."""
    T, D = q.shape[-2:]
    S = k.shape[-2]
    scores = q @ np.swapaxes(k, -1, -2) / np.sqrt(D)
    scores = np.where(np.tri(T, S, S - T, dtype=bool), scores, -np.inf)
    weights = softmax(scores)
    return scores, weights, weights @ v


def test_the_worked_example_of_attention_is_right():
    """The table above attention() shows q, k, v, scores, weights and results of three tokens."""
    lines = SOURCE.split("\ndef attention(")[0].splitlines()[-3:]
    numbers = [re.findall(r"-inf|[0-9.]+", line.replace("∞", "inf")) for line in lines]
    table = np.array(numbers, dtype=float)
    q, k, v, scores, weights, result = np.split(table, [2, 4, 6, 9, 12], axis=1)
    expected = numpy_attention(q, k, v)
    np.testing.assert_allclose(scores, expected[0], atol=0.005)  # two decimals are shown
    np.testing.assert_allclose(weights, expected[1], atol=0.0051)
    np.testing.assert_allclose(result, expected[2], atol=0.005)
    q, k, v = torch.tensor(np.stack([q, k, v])).view(3, 1, 1, 3, 2)  # B = H = 1
    computed = gpt.attention(q, k, v, torch.ones(3, 3, dtype=torch.bool).tril())
    assert_close(computed[0, 0], expected[2], 1e-14)


@both_arithmetics
@pytest.mark.parametrize("T", [7, 3, 1])
def test_attention_is_its_formula_in_every_head(T, fused):
    """softmax(q kᵀ / sqrt(D) + mask) v, for T new tokens among 7, by hand and by the kernels."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 3, T, 8))
    k = rng.normal(size=(2, 3, 7, 8))
    v = rng.normal(size=(2, 3, 7, 8))
    layer = gpt.CausalSelfAttention(dataclasses.replace(TINY, fused=fused))
    result = layer.attend(torch.tensor(q), torch.tensor(k), torch.tensor(v))
    assert_close(result, numpy_attention(q, k, v)[2], 1e-14)


@both_arithmetics
@several_shapes
def test_every_layer_keeps_the_shape_of_the_stream(config, fused):
    """(B, T, C) goes into every layer and comes out of it; only the GELU works on 4 C channels."""
    model = random_model(config, fused=fused)
    seen = []
    for layer in model.modules():
        layer.register_forward_hook(lambda layer, x, y: seen.append((type(layer), x[0], y)))
    assert model(random_tokens(2, 6)).shape == (2, 6, config.vocab_size)
    for kind in (gpt.LayerNorm, gpt.CausalSelfAttention, gpt.FeedForward, gpt.GELU):
        shape = (2, 6, config.n_embd * (4 if kind is gpt.GELU else 1))
        shapes = [(x.shape, y.shape) for layer, x, y in seen if layer is kind]
        count = 2 * config.n_layer + 1 if kind is gpt.LayerNorm else config.n_layer
        assert shapes == [(shape, shape)] * count


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
@several_shapes
def test_the_hand_written_arithmetic_is_that_of_the_kernels(config, dtype, tolerance):
    """With fused=True and fused=False the logits and the gradients of all parameters agree."""
    tokens = random_tokens(3, config.context_length + 1)
    logits = []
    gradients = []
    for fused in (True, False):
        model = random_model(config, fused=fused).to(getattr(torch, dtype))
        logits.append(model(tokens[:, :-1]))
        gpt.cross_entropy(logits[-1], tokens[:, 1:]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert_close(logits[0], logits[1], tolerance)
    assert_close(gradients[0], gradients[1], tolerance)


@both_arithmetics
def test_the_gradient_is_the_slope_of_the_loss(fused):
    """A small step along a random direction changes the loss by gradient times direction."""
    model = random_model(fused=fused).double()
    tokens = random_tokens(3, 13)
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    direction = torch.randn(start.shape, dtype=torch.float64)

    def loss_at(step):
        torch.nn.utils.vector_to_parameters(start + step * direction, model.parameters())
        return gpt.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])

    gradients = torch.autograd.grad(loss_at(0.0), list(model.parameters()))
    expected = (loss_at(1e-5) - loss_at(-1e-5)).item() / 2e-5
    slope = torch.nn.utils.parameters_to_vector(gradients) @ direction
    assert abs(expected) > 0.1
    assert slope.item() == pytest.approx(expected, rel=1e-6)


@both_arithmetics
@pytest.mark.parametrize("pieces", [[12], [5, 7], [1] * 12], ids=str)
def test_no_token_sees_those_behind_it(pieces, fused):
    """Another token at t leaves all logits before t as they were, and changes those from t on."""
    model = random_model(fused=fused)

    def read(tokens):
        if len(pieces) == 1:
            return model(tokens)
        cache = gpt.KVCache(model.config, batch_size=2)
        return torch.cat([model(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)

    tokens = random_tokens(2, 12)
    before = read(tokens)
    for t in range(12):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % TINY.vocab_size
        same = (read(changed) == before).all(dim=-1)  # (B, T)
        assert same.tolist() == [[position < t for position in range(12)]] * 2


@both_arithmetics
def test_no_gradient_reaches_a_later_position(fused):
    """The logits at t depend on the embeddings of positions 0 to t, and on no other."""
    model = random_model(fused=fused)
    for t in range(12):
        logits = model(random_tokens(1, 12))
        gradient = torch.autograd.grad(logits[0, t].square().sum(), model.position_embedding)[0]
        reached = gradient.abs().amax(dim=-1) > 0
        assert reached.tolist() == [position <= t for position in range(12)]


# Dropout sets a share of numbers to 0 in training and divides the others by 1 - that share, so that
# sums stay as large as they were. The tests count the zeros, where it acts.
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
@pytest.mark.parametrize("T", [64, 32])
def test_dropout_acts_on_the_attention_weights(T, fused):
    """With equal keys all weights are equal, and with v the identity, the result is the weights."""
    layer = gpt.CausalSelfAttention(dataclasses.replace(WIDE, fused=fused))
    q = torch.ones(20, 1, T, 64)  # T new tokens among 64
    k = torch.ones(20, 1, 64, 64)
    v = torch.eye(64).expand(20, 1, 64, 64)
    seen = torch.ones(T, 64, dtype=torch.bool).tril(diagonal=64 - T).expand(20, 1, T, 64)
    plain = layer.eval().attend(q, k, v)
    assert_dropped(layer.train().attend(q, k, v)[seen], plain[seen])


def test_dropout_acts_after_the_embeddings():
    """What goes into the first block has lost a share of its numbers, in training only."""
    model = random_model(WIDE)
    inputs = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
    tokens = random_tokens(8, 64)
    model.eval()(tokens)
    model.train()(tokens)
    assert_dropped(inputs[1], inputs[0])


def test_dropout_acts_on_what_is_added_to_the_stream():
    """The results of attention and of the feed-forward network. A text of a single token has a
    single attention weight; a projection of 0 leaves the bias alone, whatever becomes of it."""
    block = random_model(WIDE).blocks[0]
    torch.nn.init.zeros_(block.attention.projection.weight)
    x = torch.randn(500, 1, 64)
    for layer in (block.attention, block.feed_forward):
        assert_dropped(layer.train()(x), layer.eval()(x))


@both_arithmetics
def test_dropout_is_for_training_only(fused):
    """Otherwise it is as if dropout were 0. In training it is drawn anew each time."""
    tokens = random_tokens(2, 9)
    model = random_model(dropout=0.5, fused=fused)
    assert torch.equal(model(tokens), random_model(fused=fused)(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


# ==================================================================================================
# 3 Model


def test_a_new_model_begins_as_gpt2_did():
    """Matrices are N(0, 0.02²), those that add to the stream 1 / sqrt(2 n_layer) of it, biases 0."""
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(500, context_length=64, n_embd=128, n_head=4, n_layer=8))
    into_the_stream = []
    for block in model.blocks:
        into_the_stream.append(block.attention.projection.weight)
        into_the_stream.append(block.feed_forward.projection.weight)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            gain = "norm" in name and name.endswith("weight")
            assert parameter.unique().tolist() == [1.0 if gain else 0.0], name
            continue
        smaller = any(parameter is matrix for matrix in into_the_stream)
        expected = 0.02 / math.sqrt(2 * 8) if smaller else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(parameter.mean().item()) < 0.05 * expected, name


def test_the_output_head_is_the_table_of_the_embeddings():
    """One parameter has V rows, and each logit is the product of one of them with the stream.
    last_only computes those of the last position, and no others."""
    model = random_model()
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    assert shapes.count((61, 24)) == 1
    stream = []
    model.final_norm.register_forward_hook(lambda layer, args, output: stream.append(output))
    tokens = random_tokens(2, 6)
    logits = model(tokens)
    assert_close(logits, stream[0] @ model.token_embedding.T, 1e-6)
    assert_close(model(tokens, last_only=True), logits[:, -1:], 1e-6)


def test_the_loss_is_the_mean_of_minus_the_logarithm_of_the_probability():
    """-mean(ln softmax(logits)[target]); its gradient is (softmax - one-hot) / number of tokens."""
    x = np.random.default_rng(0).normal(size=(4, 5, 11))
    targets = random_tokens(4, 5, below=11)
    one_hot = np.eye(11)[targets]
    logits = torch.tensor(x, requires_grad=True)
    loss = gpt.cross_entropy(logits, targets)
    loss.backward()
    assert loss.shape == ()
    expected = -np.log((softmax(x) * one_hot).sum(axis=-1)).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert_close(logits.grad, (softmax(x) - one_hot) / 20, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_of_huge_logits_is_finite_and_right(dtype):
    """exp(10000) would be infinite; and the loss is in float32 whatever the logits are."""
    size = 9984.0  # bfloat16 has this number
    logits = torch.tensor([size, -size, 0.0, size], dtype=dtype, requires_grad=True)
    for target, distance in enumerate([0.0, 2 * size, size, 0.0]):
        loss = gpt.cross_entropy(logits, torch.tensor(target))
        assert loss.dtype == torch.float32
        # The two best share the probability: ln 2. Float32 has steps of 0.001 there.
        assert loss.item() == pytest.approx(math.log(2) + distance, abs=0.002)
        assert torch.autograd.grad(loss, logits)[0].isfinite().all()
    equal = torch.zeros(1000, dtype=dtype)  # ln 1000 is 6.908; bfloat16 would round it to 6.906
    assert gpt.cross_entropy(equal, torch.tensor(7)).item() == pytest.approx(math.log(1000), 1e-5)


# ==================================================================================================
# 4 Dataset


def test_a_text_is_cut_into_words_before_pairs_are_merged():
    """ "I'd say 42!" is five words, as the comment shows, and no token crosses their borders."""
    comment = re.search(r'("I" .*"!")', SOURCE)[1]
    words = re.findall(r'"(.*?)"', comment)
    pattern = gpt.WORDS.replace(r"[^\s\p{L}\p{N}]", "[^ a-z0-9]")  # for ASCII, re can do it
    pattern = pattern.replace(r"\p{L}", "[a-z]").replace(r"\p{N}", "[0-9]")
    assert re.findall(pattern, "I'd say 42!", re.IGNORECASE) == words
    learned = [token.decode() for token in list(gpt.train_bpe("I'd say 42!", 300))[256:]]
    assert all(any(token in word for word in words) for token in learned)
    assert {word for word in words if len(word) > 1} <= set(learned)


def test_the_worked_example_of_byte_pairs_is_right():
    """The docstring of train_bpe() shows a text, the three tokens learned from it, and a new word."""
    docstring = " ".join(gpt.train_bpe.__doc__.split())
    text = re.search(r'the text "(.*?)"', docstring)[1]
    found = re.findall(r'(\d) (?:times )?is token (\d+), "(.*?)"', docstring)
    assert len(found) == 3
    for count, _, token in found:
        assert text.count(token) == int(count)
    tokens = [token.encode() for _, _, token in found]
    ranks = gpt.train_bpe(text, 259)
    assert list(ranks)[256:] == tokens
    assert [ranks[token] for token in tokens] == [int(number) for _, number, _ in found]
    tokenizer = tiktoken.Encoding(
        "example", pat_str=gpt.WORDS, mergeable_ranks=ranks, special_tokens={}
    )
    word, first, rest = re.search(r'"( \w+)" becomes "(.*?)" ([a-z ]+)\.', docstring).groups()
    pieces = tokenizer.decode_tokens_bytes(tokenizer.encode(word))
    assert [piece.decode() for piece in pieces] == [first, *rest.split()]


def test_the_story_is_the_edition_that_the_figures_are_of():
    """the-verdict.txt has this SHA-256."""
    digest = hashlib.sha256((HERE / "the-verdict.txt").read_bytes()).hexdigest()
    assert digest == "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"


def test_the_story_is_5145_tokens_of_gpt2(vocabulary):
    """Read by the tokenizer that load_tokenizer gives, which is GPT-2's."""
    assert len(gpt.load_tokenizer().encode((HERE / "the-verdict.txt").read_text())) == 5_145


def test_byte_pair_learning_merges_the_most_frequent_pair_first():
    """The 256 bytes, then what was learned: u+g (20 times), space+p (17 times), u+n (16 times)."""
    text = " hug" * 10 + " pug" * 5 + " pun" * 12 + " bun" * 4 + " hugs" * 5
    ranks = gpt.train_bpe(text, 259)
    assert list(ranks) == [bytes([byte]) for byte in range(256)] + [b"ug", b" p", b"un"]
    assert list(ranks.values()) == list(range(259))


def test_byte_pair_learning_stops_when_no_pair_is_left():
    """ "hi" has one pair, so its vocabulary has 257 tokens, however many are asked for."""
    assert list(gpt.train_bpe("hi", 300))[256:] == [b"hi"]
    assert list(gpt.train_bpe("", 300))[256:] == []


def test_a_vocabulary_holds_at_least_the_256_bytes():
    """Fewer are an error."""
    assert len(gpt.train_bpe("hug", 256)) == 256
    with pytest.raises(gpt.UserError, match="255"):
        gpt.train_bpe("hug", 255)


def test_no_learned_token_crosses_the_border_of_a_word():
    """A space goes with the word behind it; letters, digits and other signs stay apart."""
    ranks = gpt.train_bpe("I'd say 42! " * 50, 300)
    assert set(list(ranks)[256:]) == {b"'d", b" s", b" sa", b" say", b" 4", b" 42", b" I"}


def test_a_learned_vocabulary_works_in_tiktoken_and_loses_nothing():
    """tiktoken encodes with the learned ranks, in half the tokens, and decodes to the same text."""
    text = "The more the merrier: naïve cafés, ☕ and 123 more.\n\n" * 20
    ranks = gpt.train_bpe(text, 280)
    words = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    learned = tiktoken.Encoding("", pat_str=words, mergeable_ranks=ranks, special_tokens={})
    assert len(ranks) == 280 and len(learned.encode(text)) < len(text.encode()) / 2
    for each in (text, "Ünseen \U0001f600 text", ""):
        assert learned.decode(learned.encode(each)) == each


def test_a_tokenizer_of_n_tokens_is_learned_from_the_text():
    """The last of the N is <|endoftext|>."""
    tokenizer = gpt.load_tokenizer(280, LESSON)
    assert tokenizer.n_vocab == 280
    assert tokenizer.encode("<|endoftext|>", allowed_special="all") == [279]


def test_offline_a_vocabulary_is_learned_and_a_line_says_so(offline, lesson, tmp_path, capsys):
    """It has 1,024 tokens at most, and decodes what it encodes."""
    command = lesson[: lesson.index("--tokenizer")]
    assert "1,024 tokens are learned from the text" in run(capsys, *command, "--steps", 1).err
    tokenizer = gpt.load_checkpoint(tmp_path / "out" / "checkpoint.pt")[1]
    assert 257 < tokenizer.n_vocab <= 1024
    assert tokenizer.decode(tokenizer.encode(LESSON)) == LESSON


@pytest.mark.parametrize("reason", ["--tokenizer gpt2", "--data x.bin", "--gpt2 124M", "processes"])
def test_offline_it_is_an_error_where_gpt2s_vocabulary_is_meant(
    reason, offline, lesson, tmp_path, capsys, monkeypatch
):
    """The line names the variable that tells tiktoken where the vocabulary is."""
    command = lesson[: lesson.index("--tokenizer")]
    monkeypatch.chdir(tmp_path)
    Path("x.bin").write_bytes(bytes(100))
    options = Namespace(gpt2="124M", gpt2_folder="gpt2", gpt2_url="http://127.0.0.1:9")
    if reason == "--gpt2 124M":
        with pytest.raises(gpt.UserError, match="TIKTOKEN_CACHE_DIR"):
            gpt.open_gpt2(options)
        return
    if reason == "processes":
        monkeypatch.setattr(gpt, "WORLD_SIZE", 2)
        options = gpt.make_parsers()[0].parse_args([str(argument) for argument in command])
        with pytest.raises(gpt.UserError, match="TIKTOKEN_CACHE_DIR"):
            gpt.train(options)
        return
    assert "TIKTOKEN_CACHE_DIR" in refusal(capsys, *command, *reason.split())


@pytest.mark.parametrize("source", ["tensor", "memmap"])
@pytest.mark.parametrize("stride", [1, 3, 4, 7])
@pytest.mark.parametrize("length", [3, 4, 5, 30])
def test_windows_slide_by_the_stride_and_targets_are_one_token_ahead(
    length, stride, source, tmp_path
):
    """Window i starts at i * stride; there are as many as fit together with their last target."""
    tokens = np.arange(65_500, 65_500 + length).astype("<u2")
    tokens.tofile(tmp_path / "tokens.bin")
    data = torch.from_numpy(tokens.astype(np.int64))
    if source == "memmap":
        data = np.memmap(tmp_path / "tokens.bin", dtype="<u2", mode="r")
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


@pytest.fixture
def packed(lesson, vocabulary, tmp_path):
    """The command that trains on the lesson's tokens as raw uint16, and these tokens."""
    tokens = np.array(vocabulary.encode(LESSON), dtype="<u2")
    tokens.tofile(tmp_path / "tokens.bin")
    command = [*lesson, "--n-embd", 8, "--tokenizer", "gpt2", "--val-fraction", 0]
    return [*command, "--data", tmp_path / "tokens.bin"], tokens


def test_a_bin_file_trains_as_the_text_that_it_was_made_from(packed, lesson, tmp_path, capsys):
    """Raw uint16 tokens give the very losses of the text."""
    run(capsys, *packed[0], "--steps", 3)
    run(capsys, *packed[0], "--steps", 3, *lesson[1:3], "--out", tmp_path / "text")
    assert log(tmp_path / "out") == log(tmp_path / "text")


def test_a_token_outside_the_vocabulary_is_an_error_when_its_window_is_read(
    packed, tmp_path, capsys
):
    """The line names it; the steps before were taken, for nothing reads the file ahead."""
    command, tokens = packed
    tokens[0] = 50257
    tokens.tofile(tmp_path / "tokens.bin")
    line = refusal(capsys, *command, "--batch-size", 1, "--stride", 16, "--steps", 99)
    assert "50257" in line and 0 < count_rows(tmp_path / "out") < 99


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files, and memory in kilobytes")
def test_memory_does_not_grow_with_the_data(packed, tmp_path):
    """2 GB of tokens take as much as 20 MB of them do."""
    path = tmp_path / "tokens.bin"
    command = [str(argument) for argument in packed[0]]
    command += ["--steps", "2", "--val-fraction", "0.1", "--out"]
    code = f"""if True:
        import gpt, resource
        for size in (2 * 10**7, 2 * 10**9):
            open({str(path)!r}, "wb").truncate(size)
            gpt.main({command} + [f"{tmp_path}/{{size}}"])
            print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    status, output, error = finish(start("-c", code))
    path.unlink()
    assert status == 0, error
    small, large = [int(peak) for peak in re.findall(r"^peak (\d+)", output, re.MULTILINE)]
    assert large - small < 100_000  # kilobytes


# ==================================================================================================
# 5 Training


def test_the_learning_rate_rises_evenly_and_falls_along_a_cosine():
    """From a quarter of the highest in 4 steps; half-way down after 5 more, a tenth after 10."""
    options = Namespace(steps=14, warmup=4, learning_rate=0.01)
    corners = {1: 0.0025, 2: 0.005, 4: 0.01, 9: 0.0055, 14: 0.001}
    assert {step: gpt.learning_rate(step, options) for step in corners} == pytest.approx(corners)
    rates = [gpt.learning_rate(step, options) for step in range(4, 15)]
    assert rates == sorted(rates, reverse=True)
    assert gpt.learning_rate(1, Namespace(steps=1, warmup=0, learning_rate=0.01)) > 0
    assert gpt.learning_rate(1, Namespace(steps=1, warmup=20, learning_rate=0.01)) == 0.0005


def test_adamw_looks_back_on_10_gradients_and_20_squares():
    """Its betas are 0.9 and 0.95."""
    model = gpt.GPT(gpt.GPTConfig(vocab_size=9, n_embd=4, n_head=1, n_layer=1))
    for group in gpt.make_optimizer(model, weight_decay=0.1).param_groups:
        assert group["betas"] == (0.9, 0.95)


def test_weight_decay_is_for_matrices_and_embeddings_alone(begun, tmp_path, capsys):
    """A step with decay 2 moves these by rate * 2 * weight more; gains and biases as without.
    The step is that of a resumed run: there, too, --weight-decay counts."""
    before = weights(begun / "checkpoint.pt")
    after = []
    for decay in (0, 2):
        out = shutil.copytree(begun, tmp_path / f"{decay}")
        run(capsys, "train", "--resume", "--out", out, "--steps", 3, "--weight-decay", decay)
        after.append(weights(out / "checkpoint.pt"))
    rate = float(log(out)[-1]["learning_rate"])
    assert rate > 0
    for name, weight in before.items():
        expected = after[0][name] - (rate * 2 * weight if weight.dim() == 2 else 0)
        torch.testing.assert_close(after[1][name], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_clipping_shortens_the_gradient_and_keeps_its_direction(dtype, lesson, tmp_path, capsys):
    """--clip 0.01 lets a gradient of that norm through, seen in AdamW's first mean.
    In float16 the gradient is divided by the scale before it is clipped."""
    gradients = []
    for clip in (1e9, 0.01):
        out = tmp_path / f"{clip}"
        run(capsys, *lesson, "--steps", 1, "--clip", clip, "--dtype", dtype, "--out", out)
        gradients.append(first_means(out) / (1 - 0.9))
    long, short = gradients
    assert 0.1 < long.norm() < 10
    assert short.norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(short, long * 0.01 / long.norm(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("arithmetic", [[], ["--from-scratch"]], ids=["fused", "from scratch"])
def test_a_tiny_model_learns_a_sentence_by_heart(arithmetic, lesson, tmp_path, capsys):
    """train, then sample from the checkpoint: two words bring back the whole sentence."""
    options = "--steps 150 --learning-rate 0.01 --stride 5 --val-fraction 0 --prompt Hey"
    printed = run(capsys, *lesson, *options.split(), *arithmetic)
    assert printed.out.startswith("Hey")
    assert losses(tmp_path / "out")[0] == pytest.approx(math.log(280), abs=0.3)
    assert losses(tmp_path / "out")[-1] < 0.1
    checkpoint = tmp_path / "out" / "checkpoint.pt"
    assert gpt.load_checkpoint(checkpoint)[0].config.fused is not bool(arithmetic)
    sample = ["sample", "--checkpoint", checkpoint, "--prompt", "The quick", "--temperature", 0]
    assert run(capsys, *sample, "--tokens", 60).out.startswith(LESSON[:54])


def test_training_logs_every_step_and_goes_on(lesson, tmp_path, capsys):
    """train, then train --resume with more steps: log.csv and the checkpoint count the steps."""
    out = tmp_path / "out"
    run(capsys, *lesson, "--steps", 6, "--eval-every", 4)
    rows = log(out)
    header = (out / "log.csv").read_text().splitlines()[0]
    assert header == "step,train_loss,val_loss,learning_rate,tokens_per_second"
    assert [row["step"] for row in rows] == list("123456")
    assert [row["step"] for row in rows if row["val_loss"]] == ["4", "6"]
    assert names(out) == {"checkpoint.pt", "best.pt", "log.csv"}
    assert training_state(out)["step"] == 6
    out = out.rename(tmp_path / "moved")
    run(capsys, "train", "--resume", "--out", out, "--steps", 8)
    assert log(out)[:6] == rows and count_rows(out) == training_state(out)["step"] == 8
    assert names(tmp_path) == {"lesson.txt", "moved"}


def assert_same_run(one, other):
    """Every loss, every weight and AdamW's means are the same, to the bit."""
    assert log(one) == log(other)
    for name in ("checkpoint.pt", "best.pt"):
        first = weights(one / name)
        second = weights(other / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    first = training_state(one)
    second = training_state(other)
    assert first["scaler"] == second["scaler"]
    assert len(first["optimizer"]) == len(second["optimizer"]) > 0
    for number, numbers in first["optimizer"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(numbers[name], second["optimizer"][number][name])


RANDOM = [
    "--dropout",
    "0.2",
    "--accumulate",
    "2",
    "--eval-every",
    "3",
    "--save-every",
    "7",
    "--val-fraction",
    "0.2",
]


class PowerCut(Exception):
    """What no except clause of the program expects."""


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_that_died_goes_on_to_the_bit(dtype, lesson, tmp_path, capsys, monkeypatch):
    """Dropout, windows, accumulation, scale: three deaths between checkpoints leave no trace."""
    command = [*lesson, *RANDOM, "--steps", 40, "--dtype", dtype]
    run(capsys, *command, "--out", tmp_path / "whole")
    real = gpt.cross_entropy
    for calls in (30, 35, 30):  # a step takes two, a validation some
        left = iter(range(calls))

        def dying(logits, targets, left=left):
            if next(left, None) is None:
                raise PowerCut
            return real(logits, targets)

        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            patch.setattr(gpt, "cross_entropy", dying)
            run(capsys, *command)
        command = ["train", "--resume", "--out", tmp_path / "out"]
    run(capsys, *command)
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_a_killed_process_goes_on_to_the_bit(lesson, tmp_path):
    """Also where several threads share the work, in a model that is large enough for it."""
    threads = {"OMP_NUM_THREADS": "4"}
    larger = ["--context", "64", "--batch-size", "8", "--n-embd", "128", "--steps", "40"]
    command = [HERE / "gpt.py", *lesson, *RANDOM, *larger]
    whole = start(*command, "--out", tmp_path / "whole", **threads)
    process = start(*command, **threads)
    wait_for(lambda: count_rows(tmp_path / "out") >= 18, lambda: process.poll() is None)
    process.kill()
    process.communicate()
    assert count_rows(tmp_path / "out") < 40, "it was to be killed before the end"
    assert finish(whole)[0] == 0
    again = start(HERE / "gpt.py", "train", "--resume", "--out", tmp_path / "out", **threads)
    assert finish(again)[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "out")


ONE_WINDOW = [
    "--stride",
    "1000000",
    "--batch-size",
    "1",
    "--learning-rate",
    "0",
    "--dropout",
    "0.5",
]


def test_dropout_draws_anew_in_every_step(lesson, tmp_path, capsys):
    """One window again and again, and a learning rate of 0: only dropout makes the losses differ.
    It does so after a validation and after a sample, too, which both do without it."""
    run(capsys, *lesson, *ONE_WINDOW, "--steps", 9, "--eval-every", 2, "--save-every", 3)
    assert len(set(losses(tmp_path / "out"))) == 9
    assert len({row["val_loss"] for row in log(tmp_path / "out") if row["val_loss"]}) == 1


def test_every_process_draws_dropout_of_its_own(lesson, tmp_path, capsys, monkeypatch):
    """Process 0 and process 1 read the same window, and have the same loss only without dropout."""
    for dropout, different in ((0.0, 1), (0.5, 2)):
        seen = []
        real = gpt.cross_entropy

        def spy(logits, targets, real=real, seen=seen):
            seen.append(real(logits, targets))
            return seen[-1]

        for rank in (0, 1):
            with monkeypatch.context() as patch:
                patch.setattr(gpt, "cross_entropy", spy)
                patch.setattr(gpt, "RANK", rank)
                options = ["--val-fraction", 0, "--dropout", dropout, "--batch-size", 1 + rank]
                out = tmp_path / f"{dropout} {rank}"
                run(capsys, *lesson, *ONE_WINDOW, *options, "--steps", 1, "--out", out)
        assert len(seen) == 2 and len({loss.item() for loss in seen}) == different


def test_a_batch_can_be_cut_into_micro_batches_and_processes(lesson, tmp_path, capsys):
    """8 windows, 4 twice, 4 in each of two processes, compiled or not: the same losses and means.
    Only the first of the processes prints. What they have saved, one process goes on with."""
    command = [*lesson, "--steps", 6, "--clip", 1e9, "--out"]
    code = "import functools, torch, gpt\n"
    code += "torch.compile = functools.partial(torch.compile, backend='eager')\n"
    (tmp_path / "compiled.py").write_text(code + "gpt.main()")
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = {"PYTHONPATH": str(HERE)}
    pair = start(*two, HERE / "gpt.py", *command, tmp_path / "pair")
    compiled = start(
        *two, tmp_path / "compiled.py", *command, tmp_path / "compiled", "--compile", **path
    )
    run(capsys, *command, tmp_path / "whole", "--batch-size", 8)
    run(capsys, *command, tmp_path / "accumulated", "--accumulate", 2)
    for process in (pair, compiled):
        status, output, error = finish(process)
        assert status == 0, error
        assert output.count("I HAD") == error.count("step 6/6") == 1
    run(capsys, "train", "--resume", "--steps", 9, "--out", tmp_path / "whole")
    for name in ("accumulated", "pair", "compiled"):
        again = ["--batch-size", 4, "--accumulate", 2, "--steps", 9, "--out", tmp_path / name]
        run(capsys, "train", "--resume", *again)
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "whole"), atol=1e-5)
        expected = first_means(tmp_path / "whole")
        torch.testing.assert_close(first_means(tmp_path / name), expected, rtol=0, atol=1e-5)


def test_a_compiled_model_learns_and_loads_like_any_other(lesson, tmp_path, capsys, monkeypatch):
    """torch.compile gets the model, and the checkpoint has the usual names."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run(capsys, *lesson, "--steps", 2, "--out", tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    run(capsys, *lesson, "--steps", 2, "--compile")
    assert graphs
    np.testing.assert_allclose(losses(tmp_path / "out"), losses(tmp_path / "plain"), atol=1e-5)
    assert (
        weights(tmp_path / "out/checkpoint.pt").keys() == weights(tmp_path / "out/best.pt").keys()
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.03), ("float16", 0.004)])
def test_16_bits_train_almost_as_32(dtype, tolerance, lesson, tmp_path, capsys):
    """The losses are near those of float32, and not the same; the weights stay float32."""
    for name in ("float32", dtype):
        run(capsys, *lesson, "--steps", 8, "--dtype", name, "--out", tmp_path / name)
    assert {w.dtype for w in weights(tmp_path / dtype / "checkpoint.pt").values()} == {
        torch.float32
    }
    difference = np.abs(losses(tmp_path / "float32") - losses(tmp_path / dtype))
    assert 0 < difference.max() < tolerance


def with_gradients_times(factor, steps):
    """A cross_entropy whose gradient is multiplied in the first steps, and whose value is right."""
    real = gpt.cross_entropy
    numbers = itertools.count(1)

    def patched(logits, targets):
        if logits.requires_grad and next(numbers) <= steps:
            logits.register_hook(lambda gradient: gradient * factor)
        return real(logits, targets)

    return patched


def test_float16_leaves_out_a_step_whose_gradient_is_too_large(
    lesson, tmp_path, capsys, monkeypatch
):
    """The scale is halved, AdamW sees nothing, and the next step is taken."""
    monkeypatch.setattr(gpt, "cross_entropy", with_gradients_times(math.inf, steps=1))
    command = [*lesson, "--dtype", "float16", "--save-every", 1]
    run(capsys, *command, "--steps", 1)
    state = training_state(tmp_path / "out")
    assert all(means["step"] == 0 for means in state["optimizer"].values())
    assert state["scaler"]["scale"] == 65536 / 2
    run(capsys, "train", "--resume", "--out", tmp_path / "out", "--steps", 2)
    assert first_means(tmp_path / "out").isfinite().all()


def test_float16_gives_up_when_the_scale_is_below_1(lesson, tmp_path, capsys, monkeypatch):
    """65,536 can be halved 16 times; then one line says that the run has diverged."""
    monkeypatch.setattr(gpt, "cross_entropy", with_gradients_times(math.inf, steps=99))
    line = refusal(capsys, *lesson, "--dtype", "float16", "--steps", 99)
    assert "step 17" in line and "--learning-rate" in line


def test_a_run_that_diverges_stops_and_goes_on_with_a_lower_learning_rate(
    lesson, tmp_path, capsys, monkeypatch
):
    """The line has the step and the advice; the last good checkpoint stays, and --resume works."""
    command = [*lesson, "--steps", 4, "--save-every", 2]
    with monkeypatch.context() as patch:
        real = gpt.cross_entropy
        numbers = itertools.count(1)

        def broken(logits, targets):
            return real(logits, targets) * (math.nan if next(numbers) == 3 else 1)

        patch.setattr(gpt, "cross_entropy", broken)
        line = refusal(capsys, *command, "--val-fraction", 0)
    assert re.search(r"step 3\b.*--learning-rate", line)
    assert training_state(tmp_path / "out")["step"] == 2
    run(capsys, "train", "--resume", "--out", tmp_path / "out", "--learning-rate", 1e-9)
    rates = [float(row["learning_rate"]) for row in log(tmp_path / "out")]
    assert len(rates) == 4 and rates[1] > 1e-5 and rates[2] < 1e-8


def test_a_gradient_that_is_not_finite_stops_a_run_in_float32(lesson, capsys, monkeypatch):
    """The loss is as good as ever; the weights would not be."""
    monkeypatch.setattr(gpt, "cross_entropy", with_gradients_times(math.nan, steps=1))
    assert "step 1:" in refusal(capsys, *lesson)


def test_best_pt_has_the_lowest_validation_loss(lesson, tmp_path, capsys):
    """It is the mean over the end of the text, without dropout: recomputed from both checkpoints."""
    text = 2 * LESSON + "SPHINX OF BLACK QUARTZ, JUDGE MY VOW! 01234 PACK MY BOX WITH FIVE DOZEN"
    (tmp_path / "lesson.txt").write_text(text)
    options = "--steps 40 --eval-every 1 --learning-rate 0.02 --warmup 5 --dropout 0.1"
    run(capsys, *lesson, *options.split())
    measured = [float(row["val_loss"]) for row in log(tmp_path / "out")]
    assert min(measured) < measured[-1] - 0.1, "it has risen since"
    for name, expected in (("best.pt", min(measured)), ("checkpoint.pt", measured[-1])):
        model, tokenizer, _ = gpt.load_checkpoint(tmp_path / "out" / name)
        tokens = torch.tensor(tokenizer.encode(text))
        tokens = tokens[len(tokens) - len(tokens) // 10 :]
        windows = [tokens[i : i + 17] for i in range(0, len(tokens) - 16, 16)]
        windows = torch.stack(windows)
        predictions = model(windows[:, :-1]).log_softmax(-1)
        chosen = predictions.gather(-1, windows[:, 1:, None])
        assert -chosen.mean().item() == pytest.approx(expected, rel=1e-4)


def test_the_end_of_the_text_is_never_trained_on(lesson, tmp_path, capsys):
    """Other letters in the last fifth change the validation loss, and no training loss."""
    fifth = len(LESSON) // 5
    for name, end in (("one", LESSON[-fifth:]), ("other", "?" * fifth)):
        (tmp_path / "lesson.txt").write_text(LESSON[:-fifth] + end)
        options = ["--tokenizer", 257, "--val-fraction", 0.2, "--steps", 30, "--stride", 1]
        run(capsys, *lesson, *options, "--out", tmp_path / name)
    one = log(tmp_path / "one")
    other = log(tmp_path / "other")
    assert [row["train_loss"] for row in one] == [row["train_loss"] for row in other]
    assert one[-1]["val_loss"] != other[-1]["val_loss"]


# ==================================================================================================
# 6 Decoding

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.5, 1.2, -3.0, 0.5, 1.9])
DRAWS = 40_000


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


def assert_drawn(tokens, expected):
    """The tokens occur as often as these probabilities say (Pearson's chi-square test)."""
    counts = np.bincount(tokens, minlength=len(expected))
    possible = expected > 0
    assert (counts[~possible] == 0).all()
    expected = len(tokens) * expected[possible]
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum()
    assert chi_square < 35, "with seven degrees of freedom, that happens once in 100,000 times"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 2},
        {"top_k": 4},  # the 4th, 5th and 6th place are equal: all three stay
        {"top_k": 99},
        {"top_p": 0.01},
        {"top_p": 0.6},
        {"top_p": 0.75},
        {"top_p": 1.0},
        {"temperature": 2.0, "top_p": 0.6},  # temperature is first: more tokens reach 0.6
        {"temperature": 0.5, "top_p": 0.6},  # fewer do
        {"top_k": 3, "top_p": 0.75},  # then top-k: what it leaves reaches 0.75 with fewer tokens
        {"temperature": 2.0, "top_k": 4, "top_p": 0.7},
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_probabilities_that_the_settings_define(settings):
    """Temperature, then top-k with ties, then top-p, for each row by itself: counted in draws."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([LOGITS, 1 - LOGITS])  # (2, V)
    drawn = gpt.sample_token(rows.repeat(DRAWS, 1), generator=generator, **settings)
    assert drawn.dtype == torch.int64
    drawn = drawn.view(DRAWS, 2)
    for i in (0, 1):
        assert_drawn(drawn[:, i], probabilities(softmax(rows[i].double().numpy()), **settings))


def test_the_worked_example_of_sampling_is_right():
    """The table above sample_token() shows what each setting makes of four probabilities."""
    lines = SOURCE.split("\ndef sample_token(")[0].splitlines()[-4:]
    table = np.array([line.split()[-4:] for line in lines], dtype=float)
    temperature = float(re.search(r"temperature ([\d.]+):", lines[1])[1])
    top_k = int(re.search(r"top-k (\d+):", lines[2])[1])
    top_p = float(re.search(r"top-p ([\d.]+):", lines[3])[1])
    steps = [
        ("temperature", None),
        ("temperature", temperature),
        ("top_k", top_k),
        ("top_p", top_p),
    ]
    settings = {}
    for row, (name, value) in zip(table, steps, strict=True):
        settings |= {name: value or 1.0}  # one more on each line
        expected = probabilities(table[0], **settings)
        np.testing.assert_allclose(row, expected, atol=0.005)  # two decimals are shown
        logits = torch.tensor(table[0]).log().expand(DRAWS, 4)
        generator = torch.Generator().manual_seed(0)
        assert_drawn(gpt.sample_token(logits, generator=generator, **settings), expected)
    power = table[0] ** (1 / temperature)
    assert f"{power.sum():.2f}" == re.search(r"divided by ([\d.]+)", lines[1])[1]
    two = probabilities(table[0], temperature, top_k)[:2].sum()
    assert f"{two:.2f}" == re.search(r"two have ([\d.]+)", lines[3])[1]


def test_temperature_0_takes_the_most_probable_token():
    """So does one that is almost 0."""
    for temperature in (0, 1e-300, 1e-3):
        drawn = gpt.sample_token(torch.stack([LOGITS, -LOGITS]), temperature)
        assert drawn.tolist() == [0, 5]


def test_a_setting_without_meaning_is_refused():
    """The message says which one it is, and what it was."""
    wrong = [("top_k", 0), ("top_p", 0.0), ("top_p", 1.1), ("temperature", -1.0)]
    for name, value in [*wrong, ("temperature", math.nan)]:
        with pytest.raises(gpt.UserError, match=f"{name} is {value}"):
            gpt.sample_token(LOGITS[None], **{name: value})


@both_arithmetics
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 4, 1], [1, 11]], ids=str)
def test_a_text_can_be_read_in_pieces(pieces, fused):
    """With a cache, whatever the pieces are, the logits are those of reading all at once."""
    model = random_model(fused=fused)
    tokens = random_tokens(3, 12)
    cache = gpt.KVCache(model.config, batch_size=3, length=12)
    assert cache.length == 0
    logits = [model(piece, cache) for piece in tokens.split(pieces, dim=1)]
    assert cache.length == 12
    assert_close(torch.cat(logits, dim=1), model(tokens), 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.01), ("bfloat16", 0.08)])
def test_the_cache_is_float32_beside_16_bit_weights(dtype, tolerance):
    """The model's results keep their 16 bits, and are close to those of 32."""
    model = random_model()
    tokens = random_tokens(2, 12)
    expected = model(tokens)
    model.to(getattr(torch, dtype))
    cache = gpt.KVCache(model.config, batch_size=2)
    logits = torch.cat([model(piece, cache) for piece in tokens.split([9, 1, 2], dim=1)], dim=1)
    assert cache.keys.dtype == torch.float32
    assert cache.values.dtype == torch.float32
    assert logits.dtype == getattr(torch, dtype)
    assert_close(logits.float(), expected, tolerance)


def test_what_does_not_fit_is_refused():
    """A text longer than the context or the cache, an empty prompt, and damaged weights."""
    model = random_model()
    with pytest.raises(gpt.UserError, match="13 .*12"):
        model(random_tokens(1, 13))
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


@torch.no_grad()
def recomputed(model, prompt, count):
    """Greedy text without a cache; a window that is full goes on from its newer half."""
    longest = model.config.context_length
    window = prompt[:, -longest:]
    text = []
    for _ in range(count):
        if window.shape[1] > longest:
            window = window[:, -max(1, longest // 2) :]
        text.append(model(window)[:, -1].argmax(dim=-1, keepdim=True))
        window = torch.cat([window, text[-1]], dim=1)
    return torch.cat(text, dim=1)


@both_arithmetics
@pytest.mark.parametrize("prompt_length", [1, 5, 12, 31])
@pytest.mark.parametrize("context_length", [12, 7, 2, 1])
def test_generating_is_recomputing_everything(context_length, prompt_length, fused):
    """The cache and the other rows change no token, also where the window slides."""
    model = random_model(context_length=context_length, fused=fused)
    prompt = random_tokens(3, prompt_length)
    count = 2 * context_length + 5
    expected = torch.cat([recomputed(model, row[None], count) for row in prompt])
    assert torch.equal(continuation(model, prompt, count, temperature=0), expected)


def test_the_window_slides_by_halves():
    """A full window of 10 is read afresh from its newest 5 tokens: after position 9 comes 4."""
    model = reciter(tokens=list(range(10)), vocab_size=50)
    said = continuation(model, torch.tensor([[7, 7]]), 18, temperature=0)
    assert said.tolist() == [[*range(1, 10), *range(4, 10), 4, 5, 6]]


def test_16_bit_weights_give_the_text_of_32_bits():
    """Rounding moves the logits by a thousandth; where the model is sure, it changes no token."""
    model = random_model(vocab_size=12, n_layer=3)
    prompt = random_tokens(2, 3, below=12)
    expected = recomputed(model, prompt, 30)  # more than two windows of 12
    assert len(set(expected.flatten().tolist())) > 4
    gpt.place(model, "cpu", torch.float16)
    for parameter in model.parameters():
        assert parameter.dtype == torch.float16
        assert parameter.is_contiguous()
    assert torch.equal(continuation(model, prompt, 30, temperature=0), expected)


@pytest.mark.parametrize(
    "settings", [{"top_k": 1}, {"top_p": 1e-4}, {"temperature": 1e-4}], ids=str
)
def test_generate_heeds_its_settings(settings):
    """Each of these leaves only the most probable token, also where all others are likely too."""
    model = random_model()
    prompt = random_tokens(2, 3)
    hot = {"temperature": 5.0} | settings
    assert torch.equal(continuation(model, prompt, 30, **hot), recomputed(model, prompt, 30))
    free = continuation(model, prompt, 30, temperature=5.0)
    assert not torch.equal(free, recomputed(model, prompt, 30))


def test_the_seed_decides_what_is_drawn():
    """The same seed gives the same text, another gives another, and None a new one each time."""
    model = random_model()
    prompt = random_tokens(2, 3)
    text = continuation(model, prompt, 40, seed=1)
    assert torch.equal(text, continuation(model, prompt, 40, seed=1))
    assert not torch.equal(text, continuation(model, prompt, 40, seed=2))
    torch.manual_seed(5)
    first = continuation(model, prompt, 40)
    torch.manual_seed(5)
    assert not torch.equal(first, continuation(model, prompt, 40)), "whatever was seeded before"


def test_every_row_ends_by_itself():
    """A row that has produced eos goes on with eos; when all rows have, the text is over."""
    model = random_model()
    prompt = random_tokens(3, 2)
    free = continuation(model, prompt, 200, temperature=4.0, seed=3)
    for eos in range(TINY.vocab_size):
        ends = [row.index(eos) if eos in row else 200 for row in free.tolist()]
        if len(set(ends)) == 3 and max(ends) < 200:
            break
    expected = free[:, : max(ends) + 1]
    for row, end in zip(expected, ends, strict=True):
        row[end:] = eos
    text = continuation(model, prompt, 200, temperature=4.0, seed=3, eos=eos)
    assert torch.equal(text, expected)


@pytest.mark.parametrize(
    ("said", "pieces"),
    [("né☕", ["n", "", "é", "", "", "☕", ""]), ("n\udcc3", ["n", "", "\ufffd"])],
    ids=["whole", "cut off within é"],
)
def test_text_is_written_in_whole_characters(said, pieces, monkeypatch):
    """Tokens of single bytes: a letter of several bytes waits for its last one. eos isn't shown."""
    said = said.encode(errors="surrogateescape")
    ranks = {bytes([byte]): byte for byte in range(256)}
    tokenizer = tiktoken.Encoding(
        "bytes", pat_str=gpt.WORDS, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}
    )
    written = []
    monkeypatch.setattr(gpt, "print", lambda piece, **how: written.append(piece), raising=False)
    model = reciter([256, *said, 256], vocab_size=257)
    count = gpt.write_text(model, tokenizer, "AB", 99, temperature=0, eos=256)
    assert count == len(said)
    assert written == ["AB", *pieces]


# ==================================================================================================
# 7 GPT-2 weights
# OpenAI's two files are written here by NumPy, small and with random numbers.
DATA = "model.ckpt.data-00000-of-00001"
STAND_IN = gpt.GPTConfig(vocab_size=23, context_length=16, n_embd=12, n_head=3, n_layer=12)


def write_gpt2(folder, config):
    """Write the files of a GPT-2 of this shape; returns {variable: float64 array}."""
    V, context, C, heads, blocks = dataclasses.astuple(config)[:5]
    shapes = {"wte": (V, C), "wpe": (context, C), "ln_f/g": (C,), "ln_f/b": (C,)}
    for n in range(blocks):
        for name, (rows, columns) in {
            "attn/c_attn": (C, 3 * C),
            "attn/c_proj": (C, C),
            "mlp/c_fc": (C, 4 * C),
            "mlp/c_proj": (4 * C, C),
        }.items():
            shapes |= {f"h{n}/{name}/w": (1, rows, columns), f"h{n}/{name}/b": (columns,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h{n}/{name}/g": (C,), f"h{n}/{name}/b": (C,)}
    rng = np.random.default_rng(0)
    variables = {}
    for name, shape in shapes.items():
        numbers = rng.normal(1.0 if name.endswith("g") else 0.0, 0.3, shape)
        variables[f"model/{name}"] = numbers.astype(np.float32).astype(float)
    with open(folder / DATA, "wb") as file:
        for name in sorted(variables):  # h0, h1, h10, h11, h2, ...
            file.write(variables[name].astype("<f4").tobytes())
    hparams = {"n_vocab": V, "n_ctx": context, "n_embd": C, "n_head": heads, "n_layer": blocks}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    return variables


@pytest.fixture
def stand_in(tmp_path):
    """(folder, variables) of a small GPT-2 with 12 blocks."""
    return tmp_path, write_gpt2(tmp_path, STAND_IN)


def numpy_gpt2(variables, tokens, n_head):
    """GPT-2 in float64, from the papers' equations and OpenAI's variables: (T,) -> (T, V)."""

    def norm(x, name):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
        return x * variables[f"{name}/g"] + variables[f"{name}/b"]

    def linear(x, name):
        return x @ variables[f"{name}/w"][0] + variables[f"{name}/b"]

    x = variables["model/wte"][tokens] + variables["model/wpe"][: len(tokens)]
    for n in range(sum(name.endswith("ln_1/g") for name in variables)):
        block = f"model/h{n}"
        joint = linear(norm(x, f"{block}/ln_1"), f"{block}/attn/c_attn")  # (T, 3C)
        q, k, v = np.moveaxis(joint.reshape(len(tokens), 3, n_head, -1), 0, 2)  # (H, T, D) each
        heads = numpy_attention(q, k, v)[2]
        x = x + linear(np.concatenate(list(heads), axis=-1), f"{block}/attn/c_proj")
        u = linear(norm(x, f"{block}/ln_2"), f"{block}/mlp/c_fc")
        gelu = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        x = x + linear(gelu, f"{block}/mlp/c_proj")
    return norm(x, "model/ln_f") @ variables["model/wte"].T


def numpy_loss(variables, inputs, targets, n_head):
    """The mean loss of a batch, (B, T) and (B, T)."""
    losses = []
    for row, target in zip(inputs, targets, strict=True):
        p = softmax(numpy_gpt2(variables, row, n_head))
        losses.append(-np.log(p[np.arange(len(row)), target]).mean())
    return np.mean(losses)


@both_arithmetics
@pytest.mark.parametrize("config", [STAND_IN, *SHAPES.values()], ids=["12 blocks", *SHAPES])
def test_openais_weights_give_openais_logits(config, fused, tmp_path):
    """Every logit of the loaded model is that of the equations in float64."""
    variables = write_gpt2(tmp_path, config)
    model = gpt.load_gpt2(tmp_path, fused=fused)
    assert model.config == dataclasses.replace(config, fused=fused)
    tokens = random_tokens(config.context_length, below=config.vocab_size)
    assert_close(model(tokens[None])[0], numpy_gpt2(variables, tokens, config.n_head), 1e-5)


def test_the_weights_are_views_of_the_mapped_file(stand_in):
    """Nothing is copied and nothing is written, not even if a parameter is changed."""
    folder = stand_in[0]
    before = (folder / DATA).read_bytes()
    model = gpt.load_gpt2(folder, dropout=0.1)
    assert model.config.dropout == 0.1
    assert not model.training
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert len(storages) == 1
    maps = Path("/proc/self/maps")  # on Linux: what files a process has mapped
    assert not maps.exists() or str(folder / DATA) in maps.read_text()
    torch.nn.init.zeros_(model.token_embedding)
    assert (folder / DATA).read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {"hparams.json", DATA}


@pytest.mark.parametrize("change", [-4, 4])
def test_a_file_of_another_length_is_refused(change, stand_in):
    """The message has the length that was found, and the one that the shapes give."""
    folder, variables = stand_in
    length = 4 * sum(variable.size for variable in variables.values())
    os.truncate(folder / DATA, length + change)
    with pytest.raises(gpt.UserError, match=f"{length + change:,} bytes, not {length:,}"):
        gpt.load_gpt2(folder)


@pytest.mark.parametrize("damaged", ["", '{"n_vocab": 23', "{}", "[]", "<html>"])
def test_damaged_hparams_are_refused(damaged, stand_in):
    """The message names the file."""
    (stand_in[0] / "hparams.json").write_text(damaged)
    with pytest.raises(gpt.UserError, match="hparams.json"):
        gpt.load_gpt2(stand_in[0])


def test_tensorflow_writes_and_reads_the_same(stand_in, tmp_path_factory):
    """Its file has the very bytes of NumPy's, and its reader finds what load_gpt2() makes of them."""
    tensorflow = pytest.importorskip("tensorflow")
    folder, variables = stand_in
    other = tmp_path_factory.mktemp("tensorflow")
    tensorflow.raw_ops.SaveV2(
        prefix=str(other / "model.ckpt"),
        tensor_names=sorted(variables),  # as TensorFlow 1 had them when OpenAI saved its models
        shape_and_slices=[""] * len(variables),
        tensors=[variables[name].astype(np.float32) for name in sorted(variables)],
    )
    assert (other / DATA).read_bytes() == (folder / DATA).read_bytes()
    (other / "hparams.json").write_bytes((folder / "hparams.json").read_bytes())
    model = gpt.load_gpt2(other)
    ours = {"model/wte": model.token_embedding, "model/wpe": model.position_embedding}
    layers = {"model/ln_f": model.final_norm}
    for n, block in enumerate(model.blocks):
        attention = block.attention
        joint = [attention.query, attention.key, attention.value]
        ours[f"model/h{n}/attn/c_attn/w"] = torch.cat([one.weight.T for one in joint], dim=1)[None]
        ours[f"model/h{n}/attn/c_attn/b"] = torch.cat([one.bias for one in joint])
        layers |= {f"model/h{n}/ln_1": block.norm_1, f"model/h{n}/ln_2": block.norm_2}
        layers[f"model/h{n}/attn/c_proj"] = attention.projection
        layers[f"model/h{n}/mlp/c_fc"] = block.feed_forward.expand
        layers[f"model/h{n}/mlp/c_proj"] = block.feed_forward.projection
    for name, layer in layers.items():
        norm = isinstance(layer, gpt.LayerNorm)
        ours[f"{name}/g" if norm else f"{name}/w"] = layer.weight if norm else layer.weight.T[None]
        ours[f"{name}/b"] = layer.bias
    theirs = dict(tensorflow.train.list_variables(str(other / "model.ckpt")))
    assert theirs.keys() == ours.keys()
    for name in theirs:
        expected = tensorflow.train.load_variable(str(other / "model.ckpt"), name)
        assert np.array_equal(ours[name].detach(), expected), name


# What is known of the real GPT-2 124M. The checks run on a small stand-in, too, for which NumPy
# knows the answers, so that they work when they are needed.
REAL = HERE / "gpt2" / "124M"
real_gpt2 = pytest.mark.skipif(
    not (REAL / DATA).exists(), reason="run `python gpt.py sample --gpt2 124M` first"
)
CITIZENS = """First Citizen:/Before we proceed any further, hear me speak.//All:/Speak, speak.//First
Citizen:/You are all resolved rather to die than to famish?//All:/Resolved. resolved.//First
Citizen:/First, you know Caius Marcius is chief enemy to the people.//All:/We know't, we
know't.//First Citizen:/Let us kill him, and we'll have corn at our own price./Is't a
verdict?//All:/No more talking on't; let it be done: away, away!//Second Citizen:/One word, good
citizens.//First Citizen:/We are accounted poor citizens, the patricians good./What authority
surfeits on would relieve us: if they/would yield us but the superfluity, while it
were/wholesome, we might guess they relieved us humanely;/but they think we are too dear: the
leanness that/afflicts us, the object of our misery, is as an/inventory to particularise their
abundance; our/sufferance is a gain to them Let us revenge this with/our p"""


@pytest.fixture
def tokenizer():
    """GPT-2's, if it is at hand."""
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError:
        pytest.skip("go online once, or set TIKTOKEN_CACHE_DIR: GPT-2's vocabulary isn't here")


def shakespeare(tokenizer):
    """The first 257 tokens of llm.c's Tiny Shakespeare: <|endoftext|> precedes each paragraph."""
    paragraphs = CITIZENS.replace("\n", " ").replace("/", "\n").split("\n\n")
    text = "<|endoftext|>" + "\n\n<|endoftext|>".join(paragraphs)
    return tokenizer.encode(text, allowed_special="all")


def check_text(model, prompt, expected):
    """Greedy decoding continues these tokens by those."""
    text = continuation(model, torch.tensor([prompt]), len(expected), temperature=0)
    assert text[0].tolist() == expected


def check_logits(model, tokens, expected, mean, tolerance):
    """expected: {token: its logit at the last position}; mean: that of all logits."""
    logits = model(torch.tensor([tokens]))[0]
    for token, logit in expected.items():
        assert logits[-1, token].item() == pytest.approx(logit, abs=tolerance)
    assert mean is None or logits.mean().item() == pytest.approx(mean, rel=1e-4)


def check_loss(model, tokens, expected, tolerance):
    """The mean loss of all tokens but the first."""
    tokens = torch.tensor([tokens])
    loss = gpt.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    assert loss.item() == pytest.approx(expected, abs=tolerance)


def check_learning(model, tokens, rows, expected, tolerance):
    """The losses of steps on the same batch, with AdamW and PyTorch's own settings but for 1e-4."""
    inputs = torch.tensor(tokens[:-1]).view(rows, -1)
    targets = torch.tensor(tokens[1:]).view(rows, -1)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
    )
    losses = []
    for _ in expected:
        loss = gpt.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(expected, abs=tolerance)


def numpy_learning(variables, inputs, targets, steps):
    """The losses of AdamW's steps, by its formulas; a gradient is a difference of losses."""
    sizes = [variable.size for variable in variables.values()]

    def loss_at(numbers):  # all parameters in a row
        parts = np.split(numbers, np.cumsum(sizes)[:-1])
        pairs = zip(variables.items(), parts, strict=True)
        moved = {name: part.reshape(variable.shape) for (name, variable), part in pairs}
        return numpy_loss(moved, inputs, targets, n_head=1)

    numbers = np.concatenate([variable.ravel() for variable in variables.values()])
    mean = square = 0
    losses = []
    for step in range(1, steps + 1):
        losses.append(loss_at(numbers))
        moves = 1e-6 * np.eye(len(numbers))
        g = np.array([loss_at(numbers + h) - loss_at(numbers - h) for h in moves]) / 2e-6
        mean = 0.9 * mean + 0.1 * g
        square = 0.999 * square + 0.001 * g**2
        adam = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        numbers = numbers - 1e-4 * (adam + 0.01 * numbers)
    return losses


def test_the_checks_of_gpt2_hold_for_the_stand_in(tmp_path):
    """Text, logits, losses and learning are as NumPy computes them."""
    config = gpt.GPTConfig(vocab_size=5, context_length=8, n_embd=2, n_head=1, n_layer=2)
    variables = write_gpt2(tmp_path, config)
    model = gpt.load_gpt2(tmp_path)
    tokens = random_tokens(9, below=5).tolist()
    text = tokens[:3]
    for _ in range(5):
        text.append(int(numpy_gpt2(variables, np.array(text), 1)[-1].argmax()))
    check_text(model, text[:3], text[3:])
    logits = numpy_gpt2(variables, np.array(tokens[:8]), 1)
    check_logits(model, tokens[:8], dict(enumerate(logits[-1])), logits.mean(), 1e-5)
    inputs = np.array(tokens[:-1]).reshape(2, 4)
    targets = np.array(tokens[1:]).reshape(2, 4)
    expected = numpy_loss(variables, np.array([tokens[:-1]]), np.array([tokens[1:]]), 1)
    check_loss(model, tokens, expected, 1e-5)
    expected = numpy_learning(variables, inputs, targets, steps=4)
    assert expected[0] - expected[3] > 1e-4
    check_learning(model, tokens, 2, expected, 3e-6)


def test_the_known_tokens_of_shakespeare(tokenizer):
    """They are those that llm.c's losses were measured on, by their SHA-256."""
    tokens = np.array(shakespeare(tokenizer), dtype="<u2")
    digest = "f3cb1f678d40cf5a120662b12a20fdacc5bd2e08c13ebb230a93e9f6f82f1df4"
    assert hashlib.sha256(tokens.tobytes()).hexdigest() == digest


@real_gpt2
def test_the_real_gpt2_gives_its_known_results(tokenizer):
    """The file's SHA-256; texts, logits and losses that others have published."""
    with open(REAL / DATA, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert digest == "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118"
    model = gpt.load_gpt2(REAL)
    texts = {  # picoGPT's README; the tests of transformers
        "Alan Turing theorized that computers would one day become": (
            " the most powerful machines on the planet."
        ),
        "The dog": " was found in a field near the intersection of West and West Streets.\n\nThe dog",
        "Today, I": "'m going to be doing a lot of research on this. I",
        "Hello, my dog is a little": " bit of a mess. I'm not sure if he's going",
    }
    for prompt, expected in texts.items():
        check_text(model, tokenizer.encode(prompt), tokenizer.encode(expected))
    logits = [-35.23624420, -35.32659531, -38.97534943, -39.39067459]
    logits += [-37.65318298, -38.67243576, -36.02489090, -36.48415375]
    logits = dict(enumerate(logits)) | {10000: -41.98722839, 50000: -44.11378098}
    check_logits(model, [15496], logits, None, 1e-3)
    check_logits(model, [15496, 11, 314, 716], {}, -111.89471436, None)
    hello = tokenizer.encode("<|endoftext|>Hello world!", allowed_special="all")
    check_loss(model, hello, 5.331855773925781, 4e-5)  # TransformerLens
    losses = [5.270007, 4.059707, 3.375123, 2.800783, 2.315382]
    losses += [1.849029, 1.394656, 0.999147, 0.624080, 0.376511]
    check_learning(model, shakespeare(tokenizer), 4, losses, 1e-2)  # llm.c, test_gpt2.c


# ==================================================================================================
# 8 Plumbing: files


def test_a_checkpoint_brings_back_the_model_and_its_tokenizer(tmp_path):
    """The same config, the same logits, the same tokens."""
    model = random_model(vocab_size=280, fused=False)
    tokenizer = gpt.load_tokenizer(280, LESSON)
    gpt.save_checkpoint(tmp_path / "model.pt", model, tokenizer)
    again, tokenizer_again, state = gpt.load_checkpoint(tmp_path / "model.pt")
    tokens = random_tokens(2, 12)
    assert again.config == model.config and state is None
    assert torch.equal(again(tokens), model(tokens))
    text = "lazy naïve ☕<|endoftext|>"
    ids = tokenizer.encode(text, allowed_special="all")
    assert tokenizer_again.encode(text, allowed_special="all") == ids
    assert tokenizer_again.decode(ids) == text


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(lesson, tmp_path):
    """12 runs that save in every step are killed: what is there loads, and never goes back."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["gpt", "torch._dynamo"])
    out = tmp_path / "out"
    command = [*lesson, "--steps", 10**6, "--save-every", 1, "--eval-every", 1]
    step = 0
    for kill in range(12):
        before = count_rows(out)
        process = fork.Process(target=gpt.main, args=([str(word) for word in command],))
        process.start()
        wait_for(lambda before=before: count_rows(out) > before + 1, process.is_alive)
        time.sleep(random.Random(kill).uniform(0, 0.02))
        process.kill()
        process.join()
        previous = step
        step = training_state(out)["step"]
        assert previous <= step <= count_rows(out)
        gpt.load_checkpoint(out / "best.pt")
        command = ["train", "--resume", "--out", out]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Written beside, fsync, rename: so a power cut can't leave an empty file under the name."""
    path = tmp_path / "model.pt"
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def spy(*arguments, name=name, real=real):
            done.append((name, path.exists()))
            return real(*arguments)

        monkeypatch.setattr(os, name, spy)
    gpt.save_checkpoint(path, random_model(vocab_size=280), gpt.load_tokenizer(280, LESSON))
    assert done == [("fsync", False), ("replace", False)] and path.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_ends_the_run_and_nothing_else(begun, capsys, request):
    """One line; the previous checkpoint is what it was, nothing lies beside it, and it goes on."""
    resource = pytest.importorskip("resource")
    before = (begun / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    again = ["train", "--resume", "--out", begun, "--steps", 4, "--val-fraction", 0]
    assert "checkpoint.pt" in refusal(capsys, *again)
    assert (begun / "checkpoint.pt").read_bytes() == before
    assert names(begun) == {"checkpoint.pt", "best.pt", "log.csv"}
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run(capsys, *again)


def test_a_flipped_bit_is_noticed_or_does_no_harm(tmp_path):
    """Anywhere in the file: it is refused, or (in the archive's padding) loads to the same bits."""
    path = tmp_path / "checkpoint.pt"
    model = random_model(gpt.GPTConfig(280, 8, n_embd=8, n_head=2, n_layer=1))
    gpt.save_checkpoint(path, model, gpt.load_tokenizer(280, LESSON), {"step": 3})

    def content():
        model, tokenizer, state = gpt.load_checkpoint(path)
        tensors = [tensor.numpy().tobytes() for tensor in model.state_dict().values()]
        return tensors, model.config, tokenizer.encode(LESSON), state

    data = path.read_bytes()
    expected = content()
    places = {*range(0, len(data), 211), *range(64), *range(len(data) - 64, len(data))}
    refused = 0
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        try:
            assert content() == expected, place
        except gpt.UserError:
            refused += 1
    assert refused > len(places) / 2


class Bomb:
    """Unpickled, it opens a file for writing."""

    def __reduce__(self):
        return open, ("bang", "w")


FOREIGN = ["empty", "cut", "text", "foreign", "list", "future", "bomb", "bare", "weightless"]


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_no_checkpoint_is_refused(kind, begun, tmp_path, capsys, monkeypatch):
    """One line with its name; code in it isn't run, and nothing is written over it."""
    monkeypatch.chdir(tmp_path)
    path = Path("other.pt")
    whole = (begun / "checkpoint.pt").read_bytes()
    contents = {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"I HAD always thought"}
    objects = {"foreign": {"model": torch.ones(3)}, "list": [1, 2], "bomb": {"format": Bomb()}}
    content = torch.load(begun / "checkpoint.pt", weights_only=True)
    objects["future"] = content | {"format": 999}
    objects["bare"] = {"format": content["format"]}
    objects["weightless"] = content | {"weights": {}}
    if kind in contents:
        path.write_bytes(contents[kind])
    else:
        torch.save(objects[kind], path)
    before = path.read_bytes()
    assert "other.pt" in refusal(capsys, "sample", "--checkpoint", path)
    assert path.read_bytes() == before and not Path("bang").exists()


def test_a_resumed_run_reads_its_checkpoint_and_does_not_map_it(begun, capsys, monkeypatch):
    """It is going to replace the file, which Windows refuses for one that is mapped."""
    calls = []
    real = torch.load

    def spy(*arguments, **options):
        calls.append(options["mmap"])
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "load", spy)
    run(capsys, "train", "--resume", "--out", begun, "--steps", 3)
    assert calls == [False]


# ==================================================================================================
# 8 Plumbing: OpenAI's files


@pytest.fixture
def server(tmp_path):
    """OpenAI's server, with a very small GPT-2: (address, folder of its files, what was asked)."""
    folder = tmp_path / "server" / "124M"
    folder.mkdir(parents=True)
    write_gpt2(folder, gpt.GPTConfig(50257, context_length=8, n_embd=8, n_head=1, n_layer=1))
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=tmp_path / "server")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{service.server_port}", folder, asked
        service.shutdown()


def test_the_files_are_downloaded_once(server, tmp_path):
    """Two files, two requests; the second time, none. Nothing else is left in the folder."""
    address, files, asked = server
    for _ in range(2):
        gpt.download_gpt2("124M", tmp_path / "gpt2" / "124M", address)
        assert asked == ["/124M/hparams.json", f"/124M/{DATA}"]
    assert names(tmp_path / "gpt2" / "124M") == {"hparams.json", DATA}
    for name in ("hparams.json", DATA):
        assert (tmp_path / "gpt2" / "124M" / name).read_bytes() == (files / name).read_bytes()


@pytest.mark.parametrize("damage", ["cut", "web page", "missing", "hparams"])
def test_a_file_that_is_not_right_is_not_kept(damage, server, tmp_path):
    """The error has the address; when the server is right again, so is the next try."""
    address, files, _ = server
    path = files / ("hparams.json" if damage == "hparams" else DATA)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-8], "missing": b""}.get(damage, b"<html>Log in first</html>"))
    if damage == "missing":
        path.unlink()
    with pytest.raises(gpt.UserError, match=address):
        gpt.download_gpt2("124M", tmp_path / "gpt2", address)
    assert names(tmp_path / "gpt2") == set()
    path.write_bytes(whole)
    gpt.download_gpt2("124M", tmp_path / "gpt2", address)
    assert (tmp_path / "gpt2" / path.name).read_bytes() == whole


def test_no_server_is_one_error(tmp_path):
    """Nobody listens at this port, and the other is no address at all."""
    for address in ("http://127.0.0.1:9", "http://127.0.0.1/a b", "nowhere"):
        with pytest.raises(gpt.UserError, match=address):
            gpt.download_gpt2("124M", tmp_path / "gpt2", address)


def test_gpt2_is_sampled_and_fine_tuned(server, vocabulary, lesson, tmp_path, capsys):
    """sample and train --gpt2 download, and training starts from OpenAI's weights."""
    address, files, _ = server
    gpt2 = ["--gpt2", "124M", "--gpt2-folder", tmp_path / "gpt2", "--gpt2-url", address]
    assert "5 tokens" in run(capsys, "sample", *gpt2, "--tokens", 5, "--ignore-eos").err
    few = ["--context", 8, "--batch-size", 1, "--steps", 1, "--learning-rate", 1e-9]
    run(capsys, *lesson[:5], *gpt2, *few, "--weight-decay", 0)
    tuned = weights(tmp_path / "out" / "checkpoint.pt")
    for name, weight in gpt.load_gpt2(files).state_dict().items():
        torch.testing.assert_close(tuned[name], weight, rtol=0, atol=1e-6)
    for option in (["--size", "355M"], ["--n-layer", 2], ["--tokenizer", 300]):
        assert option[0] in refusal(capsys, *lesson[:3], *gpt2, *option)


# ==================================================================================================
# 8 Plumbing: runs


def test_options_given_again_count_from_there_on(lesson, tmp_path, capsys):
    """--learning-rate, --weight-decay, --steps, --eval-every and a data file that has moved."""
    run(capsys, *lesson, "--steps", 2, "--warmup", 0, "--eval-every", 1)
    (tmp_path / "lesson.txt").rename(tmp_path / "moved.txt")
    again = ["train", "--resume", "--out", tmp_path / "out", "--steps", 4, "--eval-every", 4]
    assert "lesson.txt" in refusal(capsys, *again)
    run(capsys, *again, "--data", tmp_path / "moved.txt", "--learning-rate", 0.25)
    rows = log(tmp_path / "out")
    assert [row["step"] for row in rows if row["val_loss"]] == ["1", "2", "4"]
    assert float(rows[3]["learning_rate"]) == pytest.approx(0.025)
    before = weights(tmp_path / "out" / "checkpoint.pt")
    decay = ["--weight-decay", 8000, "--learning-rate", 1e-3, "--steps", 5]
    run(capsys, *again, "--data", tmp_path / "moved.txt", *decay)
    after = weights(tmp_path / "out" / "checkpoint.pt")
    share = after["token_embedding"].norm() / before["token_embedding"].norm()
    assert share < 0.3, "a rate of 0.0001 and a decay of 8,000 leave a fifth"


def test_what_makes_the_model_can_not_be_changed(begun, capsys):
    """An error names it; the global batch must stay, too, and steps that were taken stay taken."""
    again = ["train", "--resume", "--out", begun, "--steps", 9]
    for option in ("--seed 5", "--dropout 0.5", "--n-layer 3", "--tokenizer 300", "--from-scratch"):
        name = option.split()[0].removeprefix("--").replace("-", "_")
        assert name in refusal(capsys, *again, *option.split())
    assert re.search(r"\b12\b.*\b4\b", refusal(capsys, *again, "--batch-size", 12))
    assert re.search(r"\b1\b.*\b2\b", refusal(capsys, *again, "--steps", 1))
    assert "there is no file" in refusal(capsys, "train", "--resume", "--out", begun / "none")
    (begun / "best.pt").replace(begun / "checkpoint.pt")
    assert "no run to go on with" in refusal(capsys, *again)


def test_a_folder_that_holds_a_run_is_not_touched(begun, lesson, capsys):
    """The line says how to go on, and where else to write."""
    before = {path.name: path.read_bytes() for path in begun.iterdir()}
    line = refusal(capsys, *lesson)
    assert "--resume" in line and "--out" in line
    assert {path.name: path.read_bytes() for path in begun.iterdir()} == before


def test_ctrl_c_is_one_line_and_status_130(lesson, tmp_path):
    """Nothing is saved or waited for: --resume goes on from the last checkpoint."""
    process = start(HERE / "gpt.py", *lesson, "--steps", 10**6)
    wait_for(lambda: count_rows(tmp_path / "out") > 3, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    status, _, error = finish(process)
    assert status == 130 and "--resume" in error.splitlines()[-1] and "Traceback" not in error


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("bug"), RuntimeError("bug"), ValueError("bug")]
)
def test_a_bug_keeps_its_traceback(error, lesson, capsys, monkeypatch):
    """Only what a user can mend becomes one line."""

    def broken(*_):
        raise error

    monkeypatch.setattr(gpt, "cross_entropy", broken)
    with pytest.raises(type(error), match="bug"):
        run(capsys, *lesson)


def test_memory_that_runs_out_is_one_line(lesson, tmp_path, capsys, monkeypatch):
    """On a CPU it is a plain RuntimeError, known by its message; NumPy has a MemoryError."""
    for error in (RuntimeError("DefaultCPUAllocator: not enough memory"), MemoryError()):

        def broken(*_, error=error):
            raise error

        monkeypatch.setattr(gpt, "cross_entropy", broken)
        assert "memory" in refusal(capsys, *lesson)
    assert "memory" in refusal(capsys, *lesson, "--n-embd", 10**18, "--n-head", 1)


def test_training_works_in_any_thread(lesson, tmp_path):
    """No signal handler is set, which only the main thread may do."""
    thread = threading.Thread(target=gpt.main, args=([str(x) for x in [*lesson, "--steps", 1]],))
    thread.start()
    thread.join()
    assert training_state(tmp_path / "out")["step"] == 1


# ==================================================================================================
# 8 Plumbing: samples and the command line


@pytest.fixture
def recital(tmp_path):
    """The command that samples from a model which says "naïve ☕☕☕☕..." for ever."""
    tokenizer = gpt.load_tokenizer(257, "a")  # a token for each byte, and <|endoftext|>
    path = tmp_path / "recital.pt"
    gpt.save_checkpoint(path, reciter([*"naïve ☕☕☕".encode()], 257), tokenizer)
    return ["sample", "--checkpoint", path, "--prompt", "A", "--temperature", 0, "--device", "cpu"]


def test_the_text_goes_to_standard_output_and_the_figures_to_standard_error(recital, capsys):
    """sample closes with tokens, seconds and tokens per second."""
    printed = run(capsys, *recital, "--tokens", 16)
    assert printed.out == "Anaïve ☕☕☕\n"
    assert re.search(r"16 tokens in [\d.]+ s: [\d.]+ tokens per second", printed.err)


def test_several_samples_have_headers_and_seeds_of_their_own(recital, capsys):
    """The first of two is the sample of this seed, the second that of the next."""
    wild = [*recital, "--temperature", 1e5, "--top-k", 257, "--tokens", 20, "--ignore-eos"]
    both = run(capsys, *wild, "--samples", 2, "--seed", 7).out
    one = run(capsys, *wild, "--seed", 7).out
    other = run(capsys, *wild, "--seed", 8).out
    assert both == f"--- sample 1 ---\n{one}--- sample 2 ---\n{other}" and one != other


def test_a_dash_reads_the_prompt_from_standard_input(recital, capsys, monkeypatch):
    """All of it."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("ä\nb".encode()), "latin-1"))
    assert run(capsys, *recital, "--prompt", "-", "--tokens", 1).out.startswith("ä\nb")


def test_a_sample_stops_at_the_end_of_text(recital, tmp_path, capsys):
    """<|endoftext|> stops it and isn't shown; with --ignore-eos the text goes on."""
    said = [*b"one", 256, *b"two"]
    tokenizer = gpt.load_tokenizer(257, "a")
    gpt.save_checkpoint(tmp_path / "recital.pt", reciter(said, 257), tokenizer)
    assert run(capsys, *recital, "--tokens", 6).out == "Aone\n"
    assert run(capsys, *recital, "--tokens", 6, "--ignore-eos").out == "Aone<|endoftext|>tw\n"


@pytest.mark.parametrize(
    "prompt", ["", "\n", "naïve ☕ \x00 日本語", "<|endoftext|>", "word " * 99]
)
def test_any_prompt_works(prompt, recital, begun, capsys):
    """Empty, of any Unicode, longer than the window; in the samples of training, too."""
    assert "5 tokens" in run(capsys, *recital, "--prompt", prompt, "--tokens", 5).err
    run(capsys, "train", "--resume", "--out", begun, "--steps", 3, "--prompt", prompt)


def test_text_streams_as_utf_8_whatever_the_code_page(recital):
    """Through a pipe, as it is made, in whole letters; and a closed pipe is no error."""
    command = [*recital, "--tokens", 10**9]
    process = start(HERE / "gpt.py", *command, PYTHONIOENCODING="cp1252")
    pieces = []
    while sum(len(piece) for piece in pieces) < 100:
        pieces.append(os.read(process.stdout.fileno(), 65536))
        pieces[-1].decode("utf-8")
    assert "aïve ☕☕☕" in b"".join(pieces).decode("utf-8")
    process.stdout.close()
    error = process.stderr.read().decode()
    assert not re.search("Traceback|Exception|[Ee]rror|[Bb]roken", error), error
    assert process.wait(60) == 0


def test_damaged_weights_are_one_line(recital, tmp_path, capsys):
    """NaN among them: no text."""
    model, tokenizer, _ = gpt.load_checkpoint(recital[2])
    with torch.no_grad():
        model.final_norm.bias[0] = math.nan
    gpt.save_checkpoint(tmp_path / "nan.pt", model, tokenizer)
    assert "finite" in refusal(capsys, "sample", "--checkpoint", tmp_path / "nan.pt")


@pytest.mark.parametrize("command", ["train", "sample"])
def test_help_lists_every_option(command, capsys, monkeypatch):
    """Within 80 columns, and it is no mistake."""
    options = "--gpt2 --gpt2-folder --gpt2-url --prompt --seed --device --dtype "
    options += {
        "train": "--data --val-fraction --tokenizer --size --context --n-layer --n-head --n-embd "
        "--dropout --from-scratch --steps --batch-size --accumulate --stride --learning-rate "
        "--warmup --weight-decay --clip --eval-every --save-every --compile --out --resume",
        "sample": "--checkpoint --tokens --temperature --top-k --top-p --samples --ignore-eos",
    }[command]
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        gpt.main([command, "--help"])
    text = capsys.readouterr().out
    assert set(options.split()) <= set(re.findall(r"--[\w-]+", text))
    assert max(len(line) for line in text.splitlines()) <= 80


WRONG = {  # options: what they can't be
    "train steps batch-size accumulate context stride n-layer n-head n-embd eval-every": "0 1.5 nan",
    "train warmup seed": "-1 0.5 inf",
    "train val-fraction dropout": "-0.1 1 nan",
    "train learning-rate weight-decay clip": "-1 nan inf",
    "train size dtype device gpt2": "huge",
    "train tokenizer": "bpe 256",
    "sample tokens top-k samples": "0 0.5 x",
    "sample temperature": "-1 nan inf",
    "sample top-p": "0 1.1 nan",
    "sample seed": "-1 2e9",
}


@pytest.mark.parametrize("options", WRONG)
def test_a_wrong_value_is_one_line_that_names_it(options, lesson, capsys):
    """Nothing is written."""
    command, *option_names = options.split()
    start = [*lesson[:5]] if command == "train" else ["sample"]
    for name in option_names:
        for value in WRONG[options].split():
            line = refusal(capsys, *start, f"--{name}={value}")
            assert re.search(rf"{name}.*{re.escape(value)}", line), line
    assert not lesson[4].exists()


def test_a_wrong_command_or_file_is_one_line(lesson, tmp_path, capsys, monkeypatch):
    """It names what was given."""
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes("naïve".encode("latin-1"))
    Path("short.txt").write_text("!")
    Path("odd.bin").write_bytes(bytes(99))
    Path("even.bin").write_bytes(bytes(98))
    mistakes = {
        "trian": "trian",
        "train surplus": "surplus",
        "train --step 5": "--step",
        "sample --checkpoint missing.pt": "missing.pt",
        "sample --checkpoint x.pt --gpt2 124M": "--gpt2.*--checkpoint",
    }
    small = f"train --out new {SHAPE}"
    mistakes |= {
        f"{small} --tokenizer 280 --data missing.txt": "missing.txt",
        f"{small} --tokenizer 280 --data latin.txt": "UTF-8",
        f"{small} --tokenizer 280 --data short.txt": r"short.txt.*\b1\b.*\b17\b",
        f"{small} --tokenizer 300 --data even.bin": "tokenizer",
        f"{small} --tokenizer 280 --data short.txt --n-head 3": "n_embd 32.*n_head 3",
    }
    for command, expected in mistakes.items():
        assert re.search(expected, refusal(capsys, *command.split()))
    assert not Path("new").exists() or names(Path("new")) == set()


@pytest.mark.parametrize("columns", [0, 40, None])
def test_lines_fit_any_terminal(columns, capsys, monkeypatch):
    """One that is to be overwritten is cut to its width; it is left out where there is none."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: columns is not None)
    size = os.terminal_size((columns or 80, 24))
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: size)
    gpt.show("x" * 200, keep=False)
    gpt.show("done")
    written = capsys.readouterr().err
    if columns is None:
        assert written == "done\n"
    else:
        passing, kept = written.split("\r")
        assert passing == "x" * (size.columns - 1) and kept.rstrip() == "done"


@pytest.mark.parametrize("hardware", [True, False], ids=["has bfloat16", "emulates bfloat16"])
def test_auto_takes_what_the_gpu_has_in_hardware(hardware, monkeypatch):
    """A T4 trains in float16; an A100 in bfloat16. Samples are float16 on both."""
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: hardware or including_emulation,
    )
    for command in ("train", "sample"):
        options = types.SimpleNamespace(device="auto", dtype="auto", command=command)
        device, dtype = gpt.choose_device(options)
        expected = torch.bfloat16 if hardware and command == "train" else torch.float16
        assert (device.type, dtype) == ("cuda", expected)


def test_it_runs_without_docstrings_and_without_tensorflow():
    """python -OO strips the docstrings, and gpt.py never imports TensorFlow."""
    code = "import sys, gpt\ngpt.make_parsers()\nassert 'tensorflow' not in sys.modules"
    status, _, error = finish(start("-OO", "-c", code))
    assert status == 0, error
