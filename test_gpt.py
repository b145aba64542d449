"""What gpt.py promises, in the order of gpt.py: each test states a fact about a GPT and checks it.

The layers are held against their formulas, the model against a NumPy forward pass in float64 of a
checkpoint that TensorFlow wrote, sampling against counted frequencies, decoding against lines that
recompute everything. No test uses the network; what needs GPT-2's vocabulary or weights is skipped
where they are not at hand. Run: python -m pytest -q
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
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# No proxy listens at this port: whatever would go over the network fails at once.
os.environ |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
os.environ["no_proxy"] = "127.0.0.1"

import numpy as np
import pytest
import tiktoken
import torch
from torch import nn

import gpt

torch.set_num_threads(1)  # these models are too small to share out

HERE = Path(gpt.__file__).parent
TINY = gpt.GPTConfig(vocab_size=61, context_length=12, n_embd=24, n_head=3, n_layer=2)
SHAPES = {
    "3 heads": TINY,
    "1 head": gpt.GPTConfig(300, context_length=7, n_embd=8, n_head=1, n_layer=1),
    "no qkv bias": gpt.GPTConfig(61, 16, n_embd=30, n_head=5, n_layer=3, qkv_bias=False),
}
both_arithmetics = pytest.mark.parametrize("fused", [True, False], ids=["fused", "from-scratch"])
several_shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)


def random_model(config=TINY, **changes):
    """A GPT whose parameters have left their initial values: gains near 1, biases near 0."""
    torch.manual_seed(0)
    model = gpt.GPT(dataclasses.replace(config, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def random_tokens(*shape, below=TINY.vocab_size):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(1))


def layers(model, kind):
    return [layer for layer in model.modules() if isinstance(layer, kind)]


def embedding(model, rows):
    """The table with that many vectors, of the tokens or of the positions."""
    return next(table for table in layers(model, nn.Embedding) if table.num_embeddings == rows)


def reciter(tokens, vocab_size):
    """A GPT that says tokens[p] at position p, whatever it has read.

    Its blocks add nothing, and the vector of position p points at the token that is to follow.
    """
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(vocab_size, len(tokens), n_embd=64, n_head=2, n_layer=1)).eval()
    words = nn.functional.normalize(torch.randn(vocab_size, 64))
    with torch.no_grad():
        for matrix in (p for p in model.parameters() if p.dim() == 2):
            matrix.zero_()
        embedding(model, vocab_size).weight.copy_(words)
        embedding(model, len(tokens)).weight.copy_(100 * words[torch.tensor(tokens)])
    return model


def continuation(model, prompt, *args, **options):
    """All that generate yields, side by side: (batch, number of tokens)."""
    return torch.stack(list(gpt.generate(model, prompt, *args, **options)), dim=1)


def run(capsys, *arguments):
    """What `python gpt.py ARGUMENTS` writes to standard output (.out) and standard error (.err)."""
    capsys.readouterr()
    gpt.main([str(argument) for argument in arguments])
    return capsys.readouterr()


def assert_close(actual, expected, tolerance):
    """No difference exceeds the tolerance, as a part of the largest number that is expected."""
    scale = max(expected.abs().max().item(), 1e-3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def refusal(capsys, *arguments):
    """The last line on standard error, `gpt.py: error: ...`, of a command that ends in status 2."""
    with pytest.raises(SystemExit, match="2"):
        run(capsys, *arguments)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("gpt.py: error: ") and "Traceback" not in "".join(lines)
    return lines[-1]


def start(*command):
    """`python COMMAND` in a process of its own, buffered as usual, with one thread, as here."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, **pipes)


def logged(out):
    """The rows of log.csv, without tokens per second, which no two runs share."""
    path = out / "log.csv"
    return [row[:-1] for row in csv.reader(path.open())][1:] if path.exists() else []


def losses(out):
    return np.array([float(row[1]) for row in logged(out)])


def names(folder):
    return {file.name for file in folder.iterdir()}


def wait_for(condition, alive):
    """Return as soon as the condition holds, which it must within a minute of a live process."""
    deadline = time.monotonic() + 60
    while not condition():
        assert alive() and time.monotonic() < deadline
        time.sleep(0.002)


# ==================================================================================================
# 1 Config


@pytest.mark.parametrize(
    ("size", "n_layer", "n_embd", "n_head", "parameters"),
    [
        ("124M", 12, 768, 12, 124_439_808),
        ("355M", 24, 1024, 16, 354_823_168),
        ("774M", 36, 1280, 20, 774_030_080),
        ("1558M", 48, 1600, 25, 1_557_611_200),
    ],
)
def test_gpt2_has_the_published_shapes(size, n_layer, n_embd, n_head, parameters):
    """OpenAI's four sizes, to the last parameter; the tied output head has none of its own."""
    config = gpt.GPTConfig(50257, 1024, n_embd, n_head, n_layer, dropout=0.0, qkv_bias=True)
    assert gpt.GPT2_CONFIGS[size] == config
    assert size != "124M" or gpt.GPTConfig() == config
    with torch.device("meta"):
        assert sum(p.numel() for p in gpt.GPT(config).parameters()) == parameters


@pytest.mark.parametrize(
    "shape",
    [{"n_embd": 10, "n_head": 3}, {"dropout": 1.0}, {"dropout": -0.1}]
    + [{n: 0} for n in ("vocab_size", "context_length", "n_embd", "n_head", "n_layer")],
    ids=str,
)
def test_a_shape_that_cannot_work_is_refused(shape):
    """Heads share the channels evenly, no size is below 1, dropout lies in [0, 1)."""
    with pytest.raises(ValueError, match="|".join(shape)):
        gpt.GPTConfig(**shape)


# ==================================================================================================
# 2 Layers


@both_arithmetics
@several_shapes
def test_every_layer_keeps_the_shape_of_the_residual_stream(config, fused):
    """(B, T, C) goes into every layer and comes out; the GELU stands where there are 4 C."""
    model, seen = random_model(config, fused=fused), []
    vectors = 2 + config.n_layer * (10 if config.qkv_bias else 7)  # gains and biases
    assert sum(parameter.dim() == 1 for parameter in model.parameters()) == vectors
    kinds = [gpt.CausalSelfAttention, gpt.FeedForward, gpt.TransformerBlock, gpt.GELU]
    counts = dict.fromkeys(kinds, config.n_layer) | {gpt.LayerNorm: 2 * config.n_layer + 1}
    for layer in layers(model, tuple(counts)):
        layer.register_forward_hook(lambda m, x, y: seen.append((type(m), x[0].shape, y.shape)))
    assert model(random_tokens(2, 6)).shape == (2, 6, config.vocab_size)
    for kind, count in counts.items():
        shape = (2, 6, config.n_embd * (4 if kind is gpt.GELU else 1))
        assert [(x, y) for k, x, y in seen if k is kind] == [(shape, shape)] * count


@both_arithmetics
def test_layernorm_brings_every_position_to_mean_0_and_variance_1(fused):
    """(x - mean) / sqrt(variance + 1e-5) over the C channels; variance divides by C, not C - 1."""
    layer = layers(gpt.GPT(dataclasses.replace(TINY, fused=fused)), gpt.LayerNorm)[0].double()
    x = np.random.default_rng(0).normal(3, 0.02, size=(2, 5, TINY.n_embd))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer(torch.from_numpy(x)).detach(), expected, rtol=0, atol=1e-11)


@both_arithmetics
def test_gelu_is_gpt2s_tanh_formula(fused):
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), which differs from the exact one by 5e-4."""
    layer = layers(gpt.GPT(dataclasses.replace(TINY, fused=fused)), gpt.GELU)[0]
    x = np.linspace(-6, 6, 121)
    expected = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(layer(torch.from_numpy(x)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
@several_shapes
def test_the_hand_written_arithmetic_is_what_the_fused_kernels_compute(config, dtype, tolerance):
    """Logits and the gradients of all parameters are the same with fused=True and False."""
    fused = random_model(config).to(getattr(torch, dtype))
    scratch = gpt.GPT(dataclasses.replace(config, fused=False)).to(getattr(torch, dtype))
    scratch.load_state_dict(fused.state_dict())
    tokens = random_tokens(3, config.context_length + 1)
    one, other = (model(tokens[:, :-1]) for model in (fused, scratch))
    assert_close(one, other, tolerance)
    for logits in (one, other):
        gpt.cross_entropy(logits, tokens[:, 1:]).backward()
    gradients = [[p.grad.flatten() for p in model.parameters()] for model in (fused, scratch)]
    assert_close(*map(torch.cat, gradients), tolerance)


@both_arithmetics
def test_the_gradient_is_the_slope_of_the_loss(fused):
    """Along a random direction, in float64: against the difference of two losses nearby."""
    model, tokens = random_model(fused=fused).double(), random_tokens(3, 13)
    parameters, slope = list(model.parameters()), 0.0
    loss = lambda: gpt.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    gradients = torch.autograd.grad(loss(), parameters)
    direction = [torch.randn_like(parameter) for parameter in parameters]
    with torch.no_grad():
        for sign in (1, -2):  # from the middle up to +h, from there down to -h
            for parameter, way in zip(parameters, direction, strict=True):
                parameter.add_(way, alpha=sign * 1e-5)
            slope += (1 if sign > 0 else -1) * loss().item() / 2e-5
    expected = sum((g * way).sum() for g, way in zip(gradients, direction, strict=True)).item()
    assert abs(expected) > 0.1 and slope == pytest.approx(expected, rel=1e-6)


@both_arithmetics
@pytest.mark.parametrize("cached", [0, 5], ids=["no cache", "5 tokens in the cache"])
def test_a_position_sees_nothing_of_what_comes_after_it(cached, fused):
    """Another token at t leaves the logits before t bit-identical, and changes those from t on."""
    model, tokens = random_model(fused=fused), random_tokens(2, TINY.context_length)

    def logits(tokens):
        if not cached:
            return model(tokens)
        cache = gpt.KVCache(model.config, batch_size=2)
        return torch.cat([model(piece, cache) for piece in tokens.tensor_split([cached], 1)], 1)

    before = logits(tokens)
    for t in range(TINY.context_length):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % TINY.vocab_size
        after = logits(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert (before[:, t:] != after[:, t:]).any(-1).all()


@both_arithmetics
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_no_gradient_reaches_a_later_embedding(use_cache, fused):
    """The gradient of the logits at t is exactly 0 for the embeddings after t, and only there."""
    model, kept = random_model(fused=fused), []
    table = embedding(model, TINY.vocab_size)
    table.register_forward_hook(lambda module, args, out: kept.append(out) or out.retain_grad())
    for t in range(TINY.context_length):
        cache = [gpt.KVCache(model.config, batch_size=1)] if use_cache else []
        model(random_tokens(1, TINY.context_length), *cache)[0, t].square().sum().backward()
        reached = kept.pop().grad[0].abs().amax(-1) > 0
        assert reached.tolist() == [position <= t for position in range(TINY.context_length)]


@both_arithmetics
def test_dropout_is_for_training_only(fused):
    """In evaluation it is as if dropout were 0; in training it is drawn anew each time."""
    model, tokens = random_model(dropout=0.5, fused=fused), random_tokens(2, 9)
    assert torch.equal(model(tokens), random_model(fused=fused)(tokens))
    assert not torch.equal(model.train()(tokens), model(tokens))


# ==================================================================================================
# 3 Model


def test_a_new_model_has_gpt2s_initialisation(gpt2_folder):
    """N(0, 0.02²), the two projections back into the stream 1/sqrt(2 n_layer) of it, biases 0."""
    ends = [read_gpt2(gpt2_folder, f"h0/{layer}/c_proj/w")[0].T for layer in ("attn", "mlp")]
    loaded = gpt.load_gpt2(gpt2_folder)[0].named_parameters()
    names = [name for name, p in loaded if any(np.array_equal(p.detach(), end) for end in ends)]
    assert len(names) == 2
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(500, context_length=64, n_embd=128, n_head=4, n_layer=8))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert parameter.unique().item() == ("norm" in name and "weight" in name)
        else:
            residual = re.sub(r"\b[0-7]\b", "0", name) in names
            expected = 0.02 / math.sqrt(2 * 8) if residual else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.05 * expected, name


@both_arithmetics
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 1, 4, 1], [1, 11]], ids=str)
def test_the_cache_goes_on_where_the_reading_stopped(pieces, fused):
    """Reading in pieces of whatever length gives the logits of reading at once."""
    model, tokens = random_model(fused=fused), random_tokens(3, 12)
    cache, logits = gpt.KVCache(model.config, batch_size=3, length=12), []
    assert cache.length == 0
    for piece in tokens.split(pieces, dim=1):
        logits.append(model(piece, cache))
        assert cache.length == sum(each.shape[1] for each in logits)
    assert_close(torch.cat(logits, dim=1), model(tokens), 1e-5)


def test_the_loss_is_the_mean_negative_log_likelihood_in_nats():
    """-mean(ln softmax(logits)[target]), against NumPy; its gradient is (softmax - one-hot) / N."""
    x = np.random.default_rng(0).normal(size=(4, 5, 11))
    targets = random_tokens(4, 5, below=11)
    softmax, one_hot = np.exp(x) / np.exp(x).sum(-1, keepdims=True), np.eye(11)[targets]
    logits = torch.from_numpy(x).requires_grad_()
    loss = gpt.cross_entropy(logits, targets)
    loss.backward()
    assert loss.shape == ()
    assert loss.item() == pytest.approx(-np.log((softmax * one_hot).sum(-1)).mean(), rel=1e-12)
    np.testing.assert_allclose(logits.grad, (softmax - one_hot) / 20, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e4])
def test_the_loss_of_huge_logits_is_finite_and_right(size, dtype):
    """±1e4 neither overflow nor vanish, and low precision is widened before anything is summed."""
    logits = torch.tensor([[[size, -size, 0, size]]], dtype=dtype, requires_grad=True)
    for target in range(4):
        loss = gpt.cross_entropy(logits, torch.tensor([[target]]))
        uniform = math.log(2 if size else 4)  # equal logits share the probability evenly
        expected = uniform + (logits[0, 0, 0] - logits[0, 0, target]).item()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, abs=2e-3 if size else 1e-6, rel=1e-6)
        assert torch.autograd.grad(loss, logits)[0].isfinite().all()


# ==================================================================================================
# 4 Dataset


def test_the_story_is_the_edition_that_the_figures_are_of():
    """The Verdict is 20,479 bytes of ASCII in 83 paragraphs, with no newline at the end."""
    story = (HERE / "the-verdict.txt").read_bytes()
    assert story.startswith(b"I HAD always thought Jack Gisburn")
    assert (len(story), len(story.decode("ascii").split("\n\n"))) == (20_479, 83)
    digest = "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f"
    assert hashlib.sha256(story).hexdigest() == digest


def test_the_story_is_5145_tokens_of_gpt2():
    """GPT-2 reads it in a quarter of as many tokens as it has bytes."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except OSError as error:
        pytest.skip(f"GPT-2's vocabulary is not in tiktoken's cache: {error}")
    assert len(gpt2.encode((HERE / "the-verdict.txt").read_text())) == 5_145


def test_byte_pair_learning_merges_the_most_frequent_pair_first():
    """The 256 bytes, then what was learned: u+g (20 times), space+p (17 times), u+n (16 times)."""
    text = " hug" * 10 + " pug" * 5 + " pun" * 12 + " bun" * 4 + " hugs" * 5
    ranks = gpt.train_bpe(text, 259)
    assert list(ranks) == [bytes([byte]) for byte in range(256)] + [b"ug", b" p", b"un"]
    assert list(ranks.values()) == list(range(259))
    assert set(gpt.train_bpe("hi", 300)) == {*list(ranks)[:256], b"hi"}, "no pair is left"
    assert b"\n\n" not in gpt.train_bpe("one\n\ntwo " * 9, 270), "GPT-2's words break there"


def test_a_learned_vocabulary_works_in_tiktoken_and_loses_nothing():
    """tiktoken encodes with the learned ranks, in half the tokens, and decodes to the same text."""
    text = "The more the merrier: naïve cafés, ☕ and 123 more.\n\n" * 20
    ranks = gpt.train_bpe(text, 280)
    words = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    learned = tiktoken.Encoding("", pat_str=words, mergeable_ranks=ranks, special_tokens={})
    assert len(ranks) == 280 and len(learned.encode(text)) < len(text.encode()) / 2
    for each in (text, "Ünseen \U0001f600 text", ""):
        assert learned.decode(learned.encode(each)) == each


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
    windows = gpt.SlidingWindows(data, 4, stride)
    starts = [start for start in range(0, length, stride) if start + 4 + 1 <= length]
    assert len(windows) == len(starts)
    for index, start in enumerate(starts):
        inputs, targets = windows[index]
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.tolist() == tokens[start : start + 4].tolist()
        assert targets.tolist() == tokens[start + 1 : start + 5].tolist()


# ==================================================================================================
# 5 Training

LESSON = "The quick brown fox jumps over the lazy dog. " * 12
SMALL = "--context 16 --n-layer 1 --n-head 2 --n-embd 32 --batch-size 4 --device cpu"


@pytest.fixture
def lesson(tmp_path):
    """The command that trains a very small GPT on one sentence, into tmp_path/out."""
    (tmp_path / "lesson.txt").write_text(LESSON)
    return ["train", "--data", tmp_path / "lesson.txt", "--out", tmp_path / "out", *SMALL.split()]


def test_a_checkpoint_brings_back_the_model_and_its_tokenizer(tmp_path, gpt2_folder):
    """save_checkpoint, then load_checkpoint: the same config, the same logits, the same tokens."""
    tokenizer = gpt.load_gpt2(gpt2_folder)[1]
    model = random_model(vocab_size=VOCAB, qkv_bias=False, fused=False)
    gpt.save_checkpoint(tmp_path / "model.pt", model, tokenizer)
    again, tokenizer_again, training_state = gpt.load_checkpoint(tmp_path / "model.pt")
    assert again.config == model.config and training_state is None
    assert torch.equal(again.eval()(random_tokens(2, 12)), model(random_tokens(2, 12)))
    text = "the theory, naïve ☕<|endoftext|>"
    ids = tokenizer.encode(text, allowed_special="all")
    assert tokenizer_again.encode(text, allowed_special="all") == ids
    assert tokenizer_again.decode(ids) == text


def test_training_logs_every_step_saves_and_goes_on(lesson, tmp_path, capsys):
    """train, then train --resume with more steps: log.csv and the checkpoint count the steps."""
    out = tmp_path / "out"
    options = ["--tokenizer", 280, "--steps", 6, "--eval-every", 3, "--val-fraction", 0.2]
    run(capsys, *lesson, *options)
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert ",".join(rows[0]) == "step,train_loss,val_loss,learning_rate,tokens_per_second"
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {"3", "6"} <= {row["step"] for row in rows if row["val_loss"]} < set("123456")
    assert float(rows[0]["train_loss"]) == pytest.approx(math.log(280), abs=0.3)
    assert all(float(row["tokens_per_second"]) > 0 for row in rows)
    assert gpt.load_checkpoint(out / "checkpoint.pt")[2]["step"] == 6
    assert gpt.load_checkpoint(out / "best.pt")[2] is None

    out = out.rename(tmp_path / "moved")
    run(capsys, "train", "--resume", "--out", out, "--steps", 40)
    assert names(tmp_path) == {"lesson.txt", "moved"}
    longer = list(csv.DictReader((out / "log.csv").open()))
    assert [int(row["step"]) for row in longer] == list(range(1, 41))
    assert longer[:6] == rows
    assert float(longer[-1]["train_loss"]) < float(rows[-1]["train_loss"]) - 0.5
    assert gpt.load_checkpoint(out / "checkpoint.pt")[2]["step"] == 40


@pytest.mark.parametrize("arithmetic", [[], ["--from-scratch"]], ids=["fused", "from-scratch"])
def test_a_tiny_model_learns_a_sentence_by_heart(lesson, tmp_path, capsys, arithmetic):
    """train, then sample from the checkpoint: two words bring back the whole sentence."""
    options = "--tokenizer 280 --steps 150 --learning-rate 0.01 --stride 5 --val-fraction 0"
    run(capsys, *lesson, *options.split(), *arithmetic)
    checkpoint = tmp_path / "out" / "checkpoint.pt"
    assert gpt.load_checkpoint(checkpoint)[0].config.fused is not bool(arithmetic)
    sample = ["sample", "--checkpoint", checkpoint, "--prompt", "The quick", "--temperature", 0]
    assert LESSON[9:54] in run(capsys, *sample, "--tokens", 60, "--device", "cpu").out


def test_without_network_training_learns_its_own_vocabulary(lesson, tmp_path, capsys, monkeypatch):
    """Where GPT-2's vocabulary can't be had, a learned one serves; where it is asked for, no."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.chdir(tmp_path)
    assert "vocabulary" in run(capsys, *lesson, "--steps", 2).err
    tokenizer = gpt.load_checkpoint(tmp_path / "out" / "checkpoint.pt")[1]
    assert tokenizer.n_vocab < 50257 and tokenizer.decode(tokenizer.encode(LESSON)) == LESSON
    with pytest.raises(SystemExit, match="2"):
        run(capsys, *lesson, "--tokenizer", "gpt2", "--out", tmp_path / "other")


def test_fine_tuning_starts_from_openais_weights(lesson, gpt2_folder, tmp_path, capsys):
    """train --gpt2 keeps the whole model and its vocabulary; --context shortens windows alone."""
    options = "--context 8 --steps 1 --batch-size 2 --device cpu --learning-rate 1e-9 --gpt2 124M"
    run(capsys, *lesson[:5], *options.split(), "--gpt2-folder", gpt2_folder.parent)
    tuned, tokenizer, _ = gpt.load_checkpoint(tmp_path / "out" / "checkpoint.pt")
    start = gpt.load_gpt2(gpt2_folder)[0]
    assert (tuned.config, tokenizer.n_vocab) == (start.config, VOCAB)
    tokens = random_tokens(1, 16)
    assert_close(tuned.eval()(tokens), start.eval()(tokens), 1e-5)


def test_best_pt_has_the_lowest_validation_loss(lesson, tmp_path, capsys):
    """Which is the mean over the end of the text, as computed here from both checkpoints."""
    text = (
        2 * LESSON + "SPHINX OF BLACK QUARTZ, JUDGE MY VOW! 01234 PACK MY BOX WITH FIVE DOZEN JUGS"
    )
    (tmp_path / "lesson.txt").write_text(text)
    options = "--tokenizer 280 --steps 40 --eval-every 1 --val-fraction 0.1 --learning-rate 0.02"
    run(capsys, *lesson, *options.split(), "--warmup", 5, "--dropout", 0.1)
    measured = [float(row[2]) for row in logged(tmp_path / "out")]
    assert len(measured) == 40 and min(measured) < measured[-1] - 0.1, "it has risen since"
    for name, expected in (("best.pt", min(measured)), ("checkpoint.pt", measured[-1])):
        model, tokenizer, _ = gpt.load_checkpoint(tmp_path / "out" / name)
        tokens = torch.tensor(tokenizer.encode(text))
        tokens = tokens[len(tokens) - int(0.1 * len(tokens)) :]
        pieces = [tokens[i : i + 17] for i in range(0, len(tokens) - 16, 16)]
        logits = model(torch.stack([piece[:-1] for piece in pieces])).log_softmax(-1)
        targets = torch.stack([piece[1:] for piece in pieces])
        assert -logits.gather(-1, targets[..., None]).mean().item() == pytest.approx(expected, 1e-4)


def test_a_run_ends_with_the_course_of_its_losses(lesson, tmp_path, capsys):
    """A sparkline that falls, from the first loss to the last, and the command to try next."""
    lines = run(capsys, *lesson, "--tokenizer", 280, "--steps", 60).err.splitlines()
    first, bars, last = re.search(
        r"training +([\d.]+) ([▁▂▃▄▅▆▇█]+) ([\d.]+)", "\n".join(lines)
    ).groups()
    assert bars[0] == "█" and bars[-1] == "▁" and len(bars) == 40
    assert [float(first), float(last)] == pytest.approx(losses(tmp_path / "out")[[0, -1]], abs=1e-3)
    assert f"gpt.py sample --checkpoint {tmp_path}/out/checkpoint.pt" in lines[-1]


RUN = ["--tokenizer=280", "--dropout=0.2", "--eval-every=3", "--save-every=7", "--val-fraction=0.2"]


class PowerCut(Exception):
    """What no except clause of the program expects."""


def optimizer_state(out, name):
    """All of the optimizer's numbers of that name, side by side."""
    state = gpt.load_checkpoint(out / "checkpoint.pt")[2]["optimizer"]["state"]
    return torch.cat([state[n][name].flatten() for n in sorted(state)])


def assert_same_run(one, other):
    """Every loss, weight and running mean is the same, to the bit."""
    assert logged(one) == logged(other)
    for name in ("checkpoint.pt", "best.pt"):
        first, second = (gpt.load_checkpoint(out / name)[0].state_dict() for out in (one, other))
        assert all(torch.equal(first[key], second[key]) for key in first | second)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer_state(one, name), optimizer_state(other, name))


def test_a_run_that_died_goes_on_to_the_bit(lesson, tmp_path, capsys, monkeypatch):
    """Dropout, order, accumulation, log: three deaths between two checkpoints leave no trace."""
    command, real = [*lesson, *RUN, "--steps", 50, "--accumulate", 2], gpt.cross_entropy
    run(capsys, *command, "--out", tmp_path / "whole")
    for after in (30, 25, 30):
        calls = itertools.count()

        def dying(*batch, calls=calls, after=after):
            if next(calls) == after:
                raise PowerCut
            return real(*batch)

        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            patch.setattr(gpt, "cross_entropy", dying)
            run(capsys, *command)
        command = ["train", "--resume", "--out", tmp_path / "out"]
    run(capsys, *command)
    assert_same_run(tmp_path / "whole", tmp_path / "out")


def test_an_epoch_shows_every_window_once_in_an_order_of_its_own():
    """A function of the seed and the place alone: it can be entered anywhere, and never repeats."""
    take = lambda count, *given: list(itertools.islice(gpt.shuffled(10, *given, block=4), count))
    order = take(40, 1, 0)
    epochs = [tuple(order[begin : begin + 10]) for begin in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(epochs)) == 4
    assert all(take(7, 1, first) == order[first : first + 7] for first in range(33))
    assert take(40, 2, 0) != order


def test_dropout_draws_anew_in_every_step(tmp_path, capsys):
    """One window again and again, and a learning rate of 0: only dropout makes the losses differ."""
    (tmp_path / "window.txt").write_text("What is drawn is a function of seed and step.")
    command = ["train", "--data", tmp_path / "window.txt", "--tokenizer", 257, "--context", 44]
    command += ["--n-layer=1", "--n-head=1", "--n-embd=8", "--val-fraction=0", "--batch-size=1"]
    command += ["--learning-rate=0", "--dropout=0.5", "--steps=4", "--out", tmp_path / "out"]
    run(capsys, *command)
    assert len(set(losses(tmp_path / "out"))) == 4


def test_a_process_that_was_killed_or_interrupted_goes_on_to_the_bit(lesson, tmp_path, capsys):
    """SIGKILL, SIGTERM and SIGINT through the command line; the last two save, then 143 and 130."""
    command, out = [*lesson, *RUN, "--steps", 140], tmp_path / "out"
    run(capsys, *command, "--out", tmp_path / "whole")
    endings = [("KILL", -9), ("TERM", 143), ("KILL", -9), ("INT", 130)]
    for rows, (name, status) in zip((20, 50, 80, 110), endings, strict=True):
        process = start(HERE / "gpt.py", *command)
        wait_for(lambda rows=rows: len(logged(out)) > rows, lambda p=process: p.poll() is None)
        process.send_signal(signal.Signals[f"SIG{name}"])
        error = process.communicate(timeout=60)[1]
        assert process.returncode == status
        if status > 0:
            step = gpt.load_checkpoint(out / "checkpoint.pt")[2]["step"]
            assert step == len(logged(out)) < 140
            assert re.search(rf"\b{step}\b.*saved.*--resume", error.splitlines()[-1])
        command = ["train", "--resume", "--out", out]
    run(capsys, *command)
    assert_same_run(tmp_path / "whole", out)


def test_a_batch_can_be_cut_into_micro_steps_and_processes(lesson, tmp_path, capsys):
    """8 windows, 4 twice, 4 in each of two processes: the same losses, the same mean gradients.

    What two processes have saved, one goes on with. Only the first of them prints.
    """
    command = [*lesson, *RUN, "--dropout", 0, "--steps", 8, "--clip", 1e9, "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with start(*torchrun, HERE / "gpt.py", *command, tmp_path / "two processes") as process:
        run(capsys, *command, tmp_path / "whole", "--batch-size", 8)
        run(capsys, *command, tmp_path / "micro-steps", "--accumulate", 2)
        printed, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert printed.count("I HAD") == error.count("step 8/8") == 1
    for steps, name in itertools.product((8, 16), ("whole", "micro-steps", "two processes")):
        if steps == 16:
            again = ["train", "--resume", "--batch-size", 4, "--accumulate", 2, "--steps", steps]
            run(capsys, *again, "--out", tmp_path / name)
        pair = (tmp_path / name, tmp_path / "whole")
        assert len(losses(pair[0])) == steps
        np.testing.assert_allclose(*map(losses, pair), rtol=0, atol=1e-4)
        assert_close(*(optimizer_state(out, "exp_avg") for out in pair), 1e-3)


def test_a_resumed_run_may_change_how_it_computes(lesson, tmp_path, capsys):
    """Intervals, precision, more steps, and another cut of the same global batch of 4."""
    run(capsys, *lesson, *RUN, "--steps", 2)
    changes = "--steps 5 --batch-size 1 --accumulate 4 --dtype bfloat16 --device cpu --save-every 2"
    again = ["--eval-every", 2, "--sample-every", 2, "--resume", "--out", tmp_path / "out"]
    assert run(capsys, "train", *changes.split(), *again).out.count("I HAD") == 2
    assert [row[0] for row in logged(tmp_path / "out") if row[2]] == ["2", "4", "5"]


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine(lesson, tmp_path, capsys):
    """From 1/4 of the highest in 4 steps; half-way down after 5 more, a tenth after 10."""
    options = "--tokenizer 280 --steps 14 --warmup 4 --learning-rate 0.01"
    run(capsys, *lesson, *options.split())
    rates = {int(row[0]): float(row[3]) for row in logged(tmp_path / "out")}
    corners = {1: 0.0025, 2: 0.005, 3: 0.0075, 4: 0.01, 9: 0.0055, 14: 0.001}
    assert {step: rates[step] for step in corners} == pytest.approx(corners)
    assert all(rates[step] > rates[step + 1] for step in range(4, 14))


def test_weight_decay_is_for_matrices_and_embeddings_alone(lesson, gpt2_folder, tmp_path, capsys):
    """A step with decay 2 moves these by rate * 2 * weight more; gains and biases as without."""
    options = "--context 8 --steps 1 --warmup 1 --learning-rate 0.01 --device cpu --gpt2 124M"
    command = [*lesson[:3], *options.split(), "--gpt2-folder", gpt2_folder.parent, "--weight-decay"]
    weights = [gpt.load_gpt2(gpt2_folder)[0].state_dict()]
    for decay in (0, 2):
        run(capsys, *command, decay, "--out", tmp_path / f"{decay}")
        weights.append(gpt.load_checkpoint(tmp_path / f"{decay}/checkpoint.pt")[0].state_dict())
    for name, before in weights[0].items():
        plain, decayed = (after[name] - before for after in weights[1:])
        expected = plain - 0.01 * 2 * before if before.dim() > 1 else plain
        torch.testing.assert_close(decayed, expected, rtol=0, atol=1e-6)


def test_clipping_shortens_the_gradient_and_keeps_its_direction(lesson, tmp_path, capsys):
    """--clip 0.01 lets a gradient of that norm through, seen in AdamW's first running mean."""
    gradients = []
    for clip in (1e9, 0.01):
        out = tmp_path / f"{clip}"
        run(capsys, *lesson, "--tokenizer", 280, "--steps", 1, "--clip", clip, "--out", out)
        groups = gpt.load_checkpoint(out / "checkpoint.pt")[2]["optimizer"]["param_groups"]
        gradients.append(optimizer_state(out, "exp_avg") / (1 - groups[0]["betas"][0]))
    long, short = gradients
    assert long.norm() > 0.1 and short.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert_close(short, long * 0.01 / long.norm(), 1e-3)


def test_bfloat16_trains_on_the_cpu(lesson, tmp_path, capsys):
    """Its losses are near float32's and not the same; the weights stay float32."""
    for dtype in ("float32", "bfloat16"):
        command = [*lesson, *RUN, "--dropout", 0, "--steps", 6, "--dtype", dtype]
        run(capsys, *command, "--out", tmp_path / dtype)
        model = gpt.load_checkpoint(tmp_path / dtype / "checkpoint.pt")[0]
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    difference = np.abs(losses(tmp_path / "float32") - losses(tmp_path / "bfloat16"))
    assert 0 < difference.max() < 0.02


def compile_with(backend, monkeypatch):
    """torch.compile traces the model as ever, but hands the graphs to this backend, not to C++."""
    torch._dynamo.reset()  # forget what other backends have made
    real = torch.compile
    patched = lambda model, **options: real(model, **(options | {"backend": backend}))
    monkeypatch.setattr(torch, "compile", patched)


def test_a_compiled_model_loads_where_nothing_is_compiled(lesson, tmp_path, capsys, monkeypatch):
    """Its checkpoint has the usual names, and it learns as the model that isn't compiled."""
    graphs, command = [], [*lesson, "--tokenizer", 280, "--steps", 2, "--val-fraction", 0]
    run(capsys, *command, "--out", tmp_path / "eager")
    compile_with(lambda graph, inputs: graphs.append(graph) or graph.forward, monkeypatch)
    run(capsys, *command, "--compile")
    weights = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["weights"]
    eager = gpt.load_checkpoint(tmp_path / "eager" / "checkpoint.pt")[0]
    assert graphs and weights.keys() == eager.state_dict().keys()
    gpt.load_checkpoint(tmp_path / "out" / "checkpoint.pt")
    np.testing.assert_allclose(losses(tmp_path / "out"), losses(tmp_path / "eager"), atol=1e-4)


def test_where_there_is_no_compiler_the_run_says_so(lesson, capsys, monkeypatch):
    """What a backend of torch.compile complains of is one line, as any other mistake."""

    def backend(graph, inputs):
        raise RuntimeError("no working C++ compiler")

    compile_with(backend, monkeypatch)
    assert "C++ compiler" in refusal(capsys, *lesson, "--tokenizer", 280, "--compile")


@pytest.fixture
def packed(lesson, gpt2_folder, tmp_path):
    """The command that trains on the lesson's tokens as raw uint16, and these tokens."""
    tokens = np.array(gpt.load_gpt2(gpt2_folder)[1].encode(LESSON), dtype="<u2")
    tokens.tofile(tmp_path / "tokens.bin")
    options = ["--tokenizer", "gpt2", "--gpt2-folder", gpt2_folder.parent, "--val-fraction", 0]
    return [*lesson, *options, "--steps", 99, "--data", tmp_path / "tokens.bin"], tokens


def test_a_bin_file_trains_as_the_text_that_it_was_made_from(packed, lesson, tmp_path, capsys):
    """Raw uint16 tokens give the very losses; the vocabulary is GPT-2's, from the folder."""
    run(capsys, *packed[0], "--steps", 4)
    run(capsys, *packed[0], "--steps", 4, *lesson[1:3], "--out", tmp_path / "text")
    assert logged(tmp_path / "out") == logged(tmp_path / "text")


def test_the_end_of_the_data_is_kept_from_training(packed, tmp_path, capsys):
    """Other tokens in the last fifth change the validation loss, and no training loss."""
    command, tokens = packed
    for out in ("out", "other"):
        run(capsys, *command, "--steps", 9, "--val-fraction", 0.2, "--out", tmp_path / out)
        tokens[-(len(tokens) // 5) :] = tokens[0]
        tokens.tofile(tmp_path / "tokens.bin")
    one, other = (logged(tmp_path / out) for out in ("out", "other"))
    assert [row[:2] for row in one] == [row[:2] for row in other]
    assert one[-1][2] != other[-1][2]


def test_a_token_outside_the_vocabulary_stops_the_run_when_it_is_drawn(packed, tmp_path, capsys):
    """The line names it; the steps before were taken, for nothing reads the file ahead."""
    command, tokens = packed
    tokens[0] = VOCAB
    tokens.tofile(tmp_path / "tokens.bin")
    line = refusal(capsys, *command, "--batch-size", 1, "--stride", 16)
    assert re.search(rf"\b{VOCAB}\b", line)
    assert 0 < len(logged(tmp_path / "out")) < len(tokens) / 16


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files, and memory in kilobytes")
def test_memory_does_not_grow_with_the_data(packed, tmp_path):
    """2 GB of tokens take as much as 20 MB of them do, windows in their usual number."""
    path, command = tmp_path / "tokens.bin", [*map(str, packed[0]), "--steps", "2"]
    code = f"""if True:
        import gpt, resource
        for size in (2 * 10**7, 2 * 10**9):
            open({str(path)!r}, "wb").truncate(size)
            gpt.main({[*command, "--context", "64"]})
            print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    output = subprocess.check_output([sys.executable, "-c", code], cwd=HERE, text=True)
    path.unlink()
    small, large = map(int, re.findall(r"^peak (\d+)", output, re.MULTILINE))
    assert large - small < 100_000


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(lesson, tmp_path):
    """25 runs that save without pause are killed: what is there loads, and never goes back."""
    fork, out, step = multiprocessing.get_context("forkserver"), tmp_path / "out", 0
    fork.set_forkserver_preload(["gpt", "torch._dynamo"])
    command = [*lesson, "--tokenizer", 280, "--steps", 10**6, "--save-every", 1, "--eval-every", 1]
    for kill in range(25):
        process, rows = fork.Process(target=gpt.main, args=([*map(str, command)],)), logged(out)
        process.start()
        wait_for(lambda rows=rows: len(logged(out)) > len(rows) + 1, process.is_alive)
        time.sleep(random.Random(kill).uniform(0, 0.02))
        process.kill()
        process.join()
        before, step = step, gpt.load_checkpoint(out / "checkpoint.pt")[2]["step"]
        gpt.load_checkpoint(out / "best.pt")
        assert before <= step <= len(logged(out))
        stray = names(out) - {"checkpoint.pt", "best.pt", "log.csv"}
        assert len(stray) <= 1
        for name in stray:
            (out / name).unlink()
        command = ["train", "--resume", "--out", out]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, gpt2_folder, monkeypatch):
    """Written beside, fsync, rename: so a power cut can't leave an empty file under the name."""
    done, path, tokenizer = [], tmp_path / "model.pt", gpt.load_gpt2(gpt2_folder)[1]
    for name, real in (("fsync", os.fsync), ("replace", os.replace)):
        spy = lambda *args, name=name, real=real: done.append((name, path.exists())) or real(*args)
        monkeypatch.setattr(os, name, spy)
    gpt.save_checkpoint(path, random_model(), tokenizer)
    assert done == [("fsync", False), ("replace", False)] and path.exists()


@pytest.mark.parametrize("limit", ["disk", "file"])
def test_a_full_disk_ends_the_run_and_nothing_else(limit, lesson, tmp_path, capsys, request):
    """One line; the previous checkpoint is what it was, nothing lies beside it, and it goes on."""
    disk, out = tmp_path / "disk", tmp_path / "disk" / "out"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", disk]
    if limit == "disk":
        if not shutil.which("mount") or subprocess.run(mount, check=False).returncode:
            pytest.skip("a small disk can't be mounted")
        request.addfinalizer(lambda: subprocess.run(["umount", "-l", disk], check=True))
    run(capsys, *lesson, *RUN, "--val-fraction", 0, "--steps", 2, "--out", out)
    before, sizes = (out / "checkpoint.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == "file":
        request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, sizes))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, sizes[1]))
    again = ["train", "--resume", "--out", out, "--steps", 4]
    assert "checkpoint.pt" in refusal(capsys, *again)
    assert (out / "checkpoint.pt").read_bytes() == before
    assert names(out) == {"checkpoint.pt", "log.csv"}


@pytest.fixture
def copied(gpt2_folder, tmp_path):
    """The five files of the very small GPT-2 in a folder of this test's own."""
    (tmp_path / "124M").mkdir()
    for name in FILES:
        shutil.copy(gpt2_folder / name, tmp_path / "124M")
    return tmp_path / "124M"


def test_an_interrupted_conversion_is_never_trusted(copied, gpt2_folder, monkeypatch):
    """Half of model.pt doesn't count as model.pt: the next start converts again."""

    def die(content, file):
        file.write(b"half")
        file.flush()
        raise PowerCut

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(torch, "save", die)
        gpt.load_gpt2(copied)
    assert names(copied) - {"model.pt.tmp"} == {*FILES}
    (copied / "model.pt.tmp").write_bytes(b"half")
    models = [gpt.load_gpt2(folder)[0].eval() for folder in (copied, gpt2_folder)]
    assert torch.equal(*(model(torch.arange(9)[None]) for model in models))
    assert names(copied) == {*FILES, "model.pt"}


@pytest.fixture(scope="session")
def small_checkpoint(gpt2_folder, tmp_path_factory):
    """A file with all that a checkpoint can hold, and little of it."""
    path = tmp_path_factory.mktemp("small") / "checkpoint.pt"
    model = random_model(gpt.GPTConfig(VOCAB, 8, n_embd=8, n_head=2, n_layer=1))
    state = {"step": 3, "optimizer": torch.randn(99)}
    gpt.save_checkpoint(path, model, gpt.load_gpt2(gpt2_folder)[1], state)
    return path


def test_a_flipped_bit_is_noticed_or_does_no_harm(small_checkpoint, tmp_path):
    """Anywhere in the file: it is refused, or (in the archive's padding) loads to the same bits."""

    def content(path):
        model, tokenizer, state = gpt.load_checkpoint(path)
        tensors = [*model.state_dict().values(), state.pop("optimizer")]
        ranks = tokenizer._mergeable_ranks
        return [t.numpy().tobytes() for t in tensors], model.config, ranks, tokenizer.name, state

    data, expected, refused = small_checkpoint.read_bytes(), content(small_checkpoint), 0
    places = {*range(0, len(data), 101), *range(64), *range(len(data) - 64, len(data))}
    for place in places:
        flipped = data[place] ^ 1 << place % 8
        path = tmp_path / "damaged.pt"
        path.write_bytes(data[:place] + bytes([flipped]) + data[place + 1 :])
        try:
            assert content(path) == expected, place
        except ValueError:
            refused += 1
    assert refused > len(places) / 2


class Bomb:
    """Unpickled, it opens a file for writing."""

    def __reduce__(self):
        return open, ("bang", "w")


def saved(content):
    torch.save(content, buffer := io.BytesIO())
    return buffer.getvalue()


FOREIGN = {  # from the bytes of a checkpoint
    "empty": lambda data: b"",
    "cut in the middle": lambda data: data[: len(data) // 2],
    "its last byte lost": lambda data: data[:-1],
    "a text": lambda data: b"I HAD always thought",
    "another program's": lambda data: saved({"model": {"w": torch.ones(3)}, "epoch": 3}),
    "a list": lambda data: saved([1, 2, 3]),
    "of format 999": lambda data: saved(torch.load(io.BytesIO(data)) | {"format": 999}),
    "other weights": lambda data: saved(torch.load(io.BytesIO(data)) | {"weights": {}}),
    "code in an archive": lambda data: saved({"format": Bomb()}),
    "code in a pickle": lambda data: pickle.dumps(Bomb()),
}


@pytest.mark.parametrize("options", ["--checkpoint 124M/model.pt", "--gpt2 124M --gpt2-folder ."])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_that_is_no_checkpoint_is_refused(
    kind, options, small_checkpoint, tmp_path, capsys, monkeypatch
):
    """One line with its name; code in it isn't run, and nothing is written over it."""
    monkeypatch.chdir(tmp_path)
    (path := tmp_path / "124M" / "model.pt").parent.mkdir()
    path.write_bytes(data := FOREIGN[kind](small_checkpoint.read_bytes()))
    line = refusal(capsys, "sample", *options.split())
    assert "124M/model.pt" in line and ("999" in line) == ("999" in kind)
    assert path.read_bytes() == data and names(tmp_path) == {"124M"}


# ==================================================================================================
# 6 Decoding

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.5, 1.2, -3.0, 0.5, 1.9])
KNOBS = [
    {},
    *({"temperature": t} for t in (0.5, 3.0)),
    *({"top_k": k} for k in (1, 2, 4, 99)),  # the 4th, 5th and 6th place are equal
    *({"top_p": p} for p in (0.01, 0.6, 0.75, 1.0)),
    {"temperature": 2.0, "top_p": 0.6},  # heat first: the nucleus is larger
    {"temperature": 0.5, "top_p": 0.6},  # and cold makes it smaller
    {"top_k": 3, "top_p": 0.75},  # then top-k: the nucleus of what is left is smaller
    {"temperature": 2.0, "top_k": 4, "top_p": 0.7},
]


def probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """What the knobs define, in NumPy: the temperature, then top-k with ties, then the nucleus."""
    p = np.exp(logits.double().numpy() / temperature)
    if top_k is not None and top_k < len(p):
        p[p < np.sort(p)[-top_k]] = 0
    p /= p.sum()
    if top_p is not None:
        mass = 0.0
        for token in np.argsort(-p):
            p[token], mass = (p[token] if mass < top_p else 0), mass + p[token]
    return p / p.sum()


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_tokens_are_drawn_with_the_probabilities_that_the_knobs_define(knobs):
    """Counted in 40,000 draws a row, by Pearson's chi-square; what is ruled out never comes."""
    rows, generator = torch.stack([LOGITS, 1 - LOGITS]), torch.Generator().manual_seed(0)
    drawn = gpt.sample_token(rows.repeat(40_000, 1), generator=generator, **knobs)
    assert drawn.shape == (80_000,) and drawn.dtype == torch.int64
    for row, tokens in zip(rows, drawn.view(40_000, 2).T, strict=True):
        expected = 40_000 * probabilities(row, **knobs)
        counts, possible = np.bincount(tokens, minlength=8), expected > 0
        assert (counts[~possible] == 0).all()
        chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
        assert chi_square < 35, "seven degrees of freedom exceed that once in 100,000 times"


def test_temperature_0_takes_the_most_probable_token():
    """The limit of ever lower temperatures: greedy decoding."""
    for temperature in (0, 1e-300, 1e-3):
        drawn = gpt.sample_token(torch.stack([LOGITS, -LOGITS]), temperature)
        assert drawn.tolist() == [0, 5]


@torch.no_grad()
def recomputed(model, prompt, count):
    """Greedy text without a cache; a window that is full goes on from its newer half."""
    longest, text = model.config.context_length, []
    window = prompt[:, -longest:]
    for _ in range(count):
        if window.shape[1] > longest:
            window = window[:, -max(1, longest // 2) :]
        text.append(model(window)[:, -1].argmax(-1, keepdim=True))
        window = torch.cat([window, text[-1]], dim=1)
    return torch.cat(text, dim=1)


@both_arithmetics
@pytest.mark.parametrize("prompt_length", [1, 5, 12, 31])
@pytest.mark.parametrize("context_length", [12, 7, 2, 1])
def test_cached_decoding_is_that_of_recomputing_everything(context_length, prompt_length, fused):
    """Cached, uncached and batched decoding agree with it, across the edge of the window too."""
    model = random_model(context_length=context_length, fused=fused)
    prompt, count = random_tokens(3, prompt_length), 3 * context_length + 5
    rows = [recomputed(model, row[None], count) for row in prompt]
    for use_cache in (True, False):
        text = continuation(model, prompt, count, temperature=0, use_cache=use_cache)
        assert torch.equal(text, torch.cat(rows))


def test_the_window_slides_by_halves():
    """Once full, it is read afresh from its newer half: after position 9 comes position 4."""
    model = reciter(tokens=list(range(10)), vocab_size=50)
    for use_cache in (True, False):
        said = continuation(model, torch.tensor([[7, 7]]), 18, temperature=0, use_cache=use_cache)
        assert said.tolist() == [[*range(1, 10), *range(4, 10), 4, 5, 6]]


def test_the_same_seed_gives_the_same_text():
    """Another seed gives another text; the cache makes no difference."""
    model, prompt = random_model(), random_tokens(2, 3)
    knobs = {"temperature": 2.0, "top_k": 30, "top_p": 0.95}
    text = continuation(model, prompt, 40, **knobs, seed=1)
    assert torch.equal(text, continuation(model, prompt, 40, **knobs, seed=1))
    assert torch.equal(text, continuation(model, prompt, 40, **knobs, seed=1, use_cache=False))
    assert not torch.equal(text, continuation(model, prompt, 40, **knobs, seed=2))


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_every_row_stops_at_its_own_end_of_text(use_cache):
    """A row that has said eos goes on saying eos; when every row has, the text is over."""
    model, prompt = random_model(), random_tokens(3, 2)
    knobs = {"temperature": 4.0, "seed": 3, "use_cache": use_cache}
    free = continuation(model, prompt, 200, **knobs)
    for eos in range(TINY.vocab_size):
        ends = [row.index(eos) if eos in row else 200 for row in free.tolist()]
        if len(set(ends)) == 3 and max(ends) < 100:
            break
    for row, end in zip(free, ends, strict=True):
        row[end:] = eos
    expected = free[:, : max(ends) + 1]
    assert torch.equal(continuation(model, prompt, 200, eos=eos, **knobs), expected)


# ==================================================================================================
# 7 GPT-2 weights

FILES = ["hparams.json", "encoder.json", "vocab.bpe"]
FILES += ["model.ckpt.index", "model.ckpt.data-00000-of-00001"]
MERGES = ["t h", "th e", "Ġ the", "i n"]
VOCAB = 256 + len(MERGES) + 1
GPT2_SHAPES = [(16, 24, 3, 2), (10, 40, 5, 3), (8, 16, 1, 1), (12, 32, 4, 2)]


def write_gpt2(folder, n_ctx, n_embd, n_head, n_layer, **changes):
    """OpenAI's five files for a GPT-2 of this shape, with random numbers, written by TensorFlow.

    changes: variables instead of, or besides, those that belong there; None leaves one out.
    """
    import tensorflow

    folder.mkdir(parents=True)
    hparams = {"n_vocab": VOCAB, "n_ctx": n_ctx, "n_embd": n_embd, "n_head": n_head}
    (folder / "hparams.json").write_text(json.dumps(hparams | {"n_layer": n_layer}))

    # Every byte has a printable stand-in (OpenAI's encoder.py, bytes_to_unicode).
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    tokens = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens += [merge.replace(" ", "") for merge in MERGES] + ["<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")

    shapes = {"wte": (VOCAB, n_embd), "wpe": (n_ctx, n_embd)}
    for norm in ["ln_f", *(f"h{i}/ln_{n}" for i in range(n_layer) for n in (1, 2))]:
        shapes |= {f"{norm}/g": (n_embd,), f"{norm}/b": (n_embd,)}
    widths = {
        "attn/c_attn": (1, 3),
        "attn/c_proj": (1, 1),
        "mlp/c_fc": (1, 4),
        "mlp/c_proj": (4, 1),
    }
    for name, (rows, columns) in widths.items():
        for i in range(n_layer):
            shapes[f"h{i}/{name}/w"] = (1, rows * n_embd, columns * n_embd)
            shapes[f"h{i}/{name}/b"] = (columns * n_embd,)
    random, spread, variables = np.random.default_rng(0), {"wte": 0.02, "wpe": 0.02}, {}
    for name, shape in shapes.items():
        centre = 1 if name.endswith("/g") else 0
        variables[f"model/{name}"] = random.normal(centre, spread.get(name, 0.25), shape)
    variables = {name: v for name, v in (variables | changes).items() if v is not None}
    tensorflow.raw_ops.SaveV2(
        prefix=str(folder / "model.ckpt"),
        tensor_names=list(variables),
        shape_and_slices=[""] * len(variables),
        tensors=[variable.astype(np.float32) for variable in variables.values()],
    )
    return folder


def read_gpt2(folder, name):
    """A variable of OpenAI's checkpoint, in float64."""
    import tensorflow

    return tensorflow.train.load_variable(str(folder / "model.ckpt"), f"model/{name}").astype(float)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    """A very small GPT-2 as OpenAI publishes them, in a folder named 124M."""
    return write_gpt2(tmp_path_factory.mktemp("gpt2") / "124M", *GPT2_SHAPES[0])


def numpy_gpt2(folder, tokens, n_head, n_layer):
    """GPT-2's forward pass from the papers' equations, in float64: ids (T,) -> logits (T, V)."""

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred / deviation * read_gpt2(folder, f"{name}/g") + read_gpt2(folder, f"{name}/b")

    def linear(x, name):
        return x @ read_gpt2(folder, f"{name}/w")[0] + read_gpt2(folder, f"{name}/b")

    x = read_gpt2(folder, "wte")[tokens] + read_gpt2(folder, "wpe")[: len(tokens)]
    for h in (f"h{i}" for i in range(n_layer)):
        joint = np.split(linear(norm(x, f"{h}/ln_1"), f"{h}/attn/c_attn"), 3, axis=-1)
        heads = []
        for q, k, v in zip(*(np.split(part, n_head, axis=-1) for part in joint), strict=True):
            scores = q @ k.T / np.sqrt(q.shape[-1])
            scores[np.triu_indices(len(tokens), k=1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v)
        x = x + linear(np.concatenate(heads, axis=-1), f"{h}/attn/c_proj")
        u = linear(norm(x, f"{h}/ln_2"), f"{h}/mlp/c_fc")
        gelu = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        x = x + linear(gelu, f"{h}/mlp/c_proj")
    return norm(x, "ln_f") @ read_gpt2(folder, "wte").T


@pytest.mark.parametrize("shape", GPT2_SHAPES, ids=str)
def test_openais_weights_give_openais_logits(shape, tmp_path):
    """Every logit of the loaded model, in both arithmetics, is that of the equations in float64."""
    folder, tokens = write_gpt2(tmp_path / "124M", *shape), random_tokens(shape[0], below=VOCAB)
    loaded, expected = gpt.load_gpt2(folder)[0], numpy_gpt2(folder, tokens.numpy(), *shape[2:])
    names = ("context_length", "n_embd", "n_head", "n_layer")
    assert tuple(getattr(loaded.config, name) for name in names) == shape
    for fused in (True, False):
        model = gpt.GPT(dataclasses.replace(loaded.config, fused=fused)).eval()
        model.load_state_dict(loaded.state_dict())
        difference = np.abs(model(tokens[None])[0].detach().numpy() - expected).max()
        assert difference < 1e-5 * expected.std()


def test_the_tokenizer_comes_from_the_two_files_beside_the_weights(gpt2_folder):
    """encoder.json's printable stand-ins are bytes again, and <|endoftext|> is one token."""
    tokenizer = gpt.load_gpt2(gpt2_folder)[1]
    encoder = json.loads((gpt2_folder / "encoder.json").read_text())
    expected = [encoder[t] for t in ("the", "Ġthe", "n", "Ġ", "in", "Ã", "¯", "<|endoftext|>")]
    assert tokenizer.encode("the then inï<|endoftext|>", allowed_special="all") == expected
    assert tokenizer.n_vocab == VOCAB
    everything = "".join(map(chr, range(0x250))) + "☕\U0001f600"
    assert tokenizer.decode(tokenizer.encode(everything)) == everything


def test_a_mapped_model_gives_the_very_logits_of_a_copied_one(gpt2_folder):
    """The second start maps model.pt into memory, and not a bit of the logits changes."""
    converted, mapped = (gpt.load_gpt2(gpt2_folder)[0].eval() for _ in range(2))
    copied, clones = gpt.GPT(mapped.config).eval(), mapped.state_dict()
    clones = {name: tensor.clone() for name, tensor in clones.items()}
    copied.load_state_dict(clones, assign=True)  # each in memory of its own, laid out as it was
    logits = [model(random_tokens(2, 16)) for model in (converted, mapped, copied)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[1], logits[2])
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(gpt2_folder / "model.pt") in maps.read_text()


MISFITS = {
    "missing": {"model/h1/mlp/c_proj/b": None},
    "surplus": {"model/h2/ln_1/g": np.ones(24)},
    "wrongly shaped": {"model/h1/attn/c_attn/w": np.ones((1, 24, 71))},
}


@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(change, tmp_path, capsys):
    """Every variable is used and every parameter set, exactly once; else the error names it."""
    folder = write_gpt2(tmp_path / "124M", *GPT2_SHAPES[0], **change)
    with pytest.raises(SystemExit, match="2"):
        run(capsys, "sample", "--gpt2", "124M", "--gpt2-folder", tmp_path)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("gpt.py: error:") and next(iter(change)) in error
    assert "c_attn" not in error or ("71" in error and "72" in error), "it names both shapes"
    assert not (folder / "model.pt").exists()


def test_sampling_downloads_converts_and_remembers(gpt2_folder, tmp_path, capsys):
    """From nothing, sample --gpt2 fetches OpenAI's five files; the second time it fetches none."""
    files = http.server.SimpleHTTPRequestHandler
    mirror = functools.partial(files, directory=gpt2_folder.parent)
    command = ["sample", "--gpt2", "124M", "--gpt2-folder", tmp_path, "--prompt", "the"]
    command += ["--tokens", 12, "--temperature", 0, "--ignore-eos", "--gpt2-url"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), mirror) as server:
        command.append(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        first = run(capsys, *command).out
        server.shutdown()
    assert {file.name for file in (tmp_path / "124M").iterdir()} == {*FILES, "model.pt"}
    for file in FILES:
        assert (tmp_path / "124M" / file).read_bytes() == (gpt2_folder / file).read_bytes()
    assert run(capsys, *command).out == first, "without the server"


def test_a_second_start_needs_neither_tensorflow_nor_the_compiler(gpt2_folder):
    """Once converted, sample --gpt2 imports no tensorflow and no torch._dynamo: it starts fast."""
    gpt.load_gpt2(gpt2_folder)
    command = ["sample", "--gpt2", "124M", "--gpt2-folder", str(gpt2_folder.parent)]
    code = f"import sys, gpt; gpt.main({[*command, '--tokens', '3', '--ignore-eos']})\n"
    code += "sys.exit(str({'tensorflow', 'torch._dynamo'} & set(sys.modules)))"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, capture_output=True, check=False
    )
    assert process.stderr.decode().splitlines()[-1] == "set()"


def test_the_real_gpt2_gives_its_known_continuation():
    """The published weights, decoded greedily, finish this sentence in one way only."""
    folder = HERE / "gpt2" / "124M"
    if not (folder / FILES[-1]).exists() and not (folder / "model.pt").exists():
        pytest.skip("GPT-2's weights are not in gpt2/124M")
    model, tokenizer = gpt.load_gpt2(folder)
    prompt = tokenizer.encode("Alan Turing theorized that computers would one day become")
    text = continuation(model, torch.tensor([prompt]), 8, temperature=0)
    assert tokenizer.decode(text[0].tolist()) == " the most powerful machines on the planet."


DAMAGE = {  # file, and what becomes of its bytes
    "data, a bit": (FILES[4], lambda data: data[:9] + bytes([data[9] ^ 16]) + data[10:]),
    "data, cut": (FILES[4], lambda data: data[: len(data) // 2]),
    "index, a bit": (FILES[3], lambda data: data[:99] + bytes([data[99] ^ 16]) + data[100:]),
    "index, cut": (FILES[3], lambda data: data[: len(data) // 2]),
    "hparams, cut": (FILES[0], lambda data: data[:9]),
    "hparams, empty": (FILES[0], lambda data: b"{}"),
    "encoder, cut": (FILES[1], lambda data: data[: len(data) // 2]),
    "merges, other": (FILES[2], lambda data: data.replace(b"t h", b"t x")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_in_openais_files_is_noticed(name, copied, tmp_path, capsys):
    """The line names the folder and says to delete; nothing is converted."""
    file, damage = DAMAGE[name]
    (copied / file).write_bytes(damage((copied / file).read_bytes()))
    line = refusal(capsys, "sample", "--gpt2", "124M", "--gpt2-folder", tmp_path)
    assert str(copied) in line and "delete" in line and names(copied) == {*FILES}


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves OpenAI's files with ranges, and does wrong what server.faults says, once each."""

    def do_GET(self):
        name, begin = self.path.rpartition("/")[2], 0
        self.server.asked.append((name, self.headers["Range"]))
        fault = (self.server.faults.get(name) or ["none"]).pop(0)
        if isinstance(fault, int):
            return self.send_error(fault)
        content = (self.server.folder / name).read_bytes()
        if fault == "page":
            content = b"\r\n<!DOCTYPE html><html><title>Log in</title></html>"
        elif self.headers["Range"] and fault != "no ranges":
            begin = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        if begin >= len(content):
            return self.send_error(416)
        self.send_response(302 if fault == "redirect" else 206 if begin else 200)
        if fault == "redirect":
            self.send_header("Location", "http://192.0.2.1/elsewhere")
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        if fault != "no length":
            self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        stop = (len(content) + begin) // 2 if fault in ("cut", "silence") else len(content)
        self.wfile.write(content[begin:stop])
        if fault == "silence":
            self.server.over.wait(10)

    def log_message(self, *args):
        """Nothing."""


@pytest.fixture
def mirror(gpt2_folder, tmp_path):
    """A server on this machine, with .faults to come and .asked, and the command that uses it."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        server.folder, server.faults, server.asked = gpt2_folder, {}, []
        server.over, server.url = threading.Event(), f"http://127.0.0.1:{server.server_port}/models"
        server.command = ["sample", "--gpt2", "124M", "--gpt2-folder", tmp_path, "--tokens", 1]
        server.command += ["--gpt2-url", server.url]
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture
def connections(mirror, monkeypatch):
    """Every (address, timeout) that was connected to; silence lasts a second, not as long."""
    made, real = [], socket.create_connection

    def connect(address, timeout, *args, **options):
        made.append((address, timeout))
        silence = ["silence"] in mirror.faults.values()
        return real(address, 1 if silence else timeout, *args, **options)

    monkeypatch.setattr(socket, "create_connection", connect)
    return made


FAULTS = [[fault] for fault in (404, 500, "cut", "silence", "page", "no length", "redirect")]
FAULTS += [["cut", fault] for fault in ("cut", "no ranges", "page", 503)]


@pytest.mark.parametrize("name", [FILES[0], FILES[4]], ids=["small file", "large file"])
@pytest.mark.parametrize("faults", FAULTS, ids=str)
def test_a_download_that_went_wrong_goes_on_when_run_again(
    faults, name, mirror, gpt2_folder, tmp_path, capsys, connections
):
    """A fault is a line with the address; then all is fetched, from where it stopped if it can be.

    Nothing is sent to another machine, and no file has its name before it is whole.
    """
    mirror.faults, folder = {name: list(faults)}, tmp_path / "124M"
    for _ in range(len(faults) - faults.count("no ranges")):
        line = refusal(capsys, *mirror.command)
        assert f"{mirror.url}/124M/{name}" in line and "again" in line and "NoneType" not in line
        assert name not in names(folder)
    run(capsys, *mirror.command)
    assert all((folder / f).read_bytes() == (gpt2_folder / f).read_bytes() for f in FILES)
    assert names(folder) == {*FILES, "model.pt"}
    assert {address for address, _ in connections} == {("127.0.0.1", mirror.server_port)}
    assert all(1 <= timeout <= 120 for _, timeout in connections)
    asked = [begin for file, begin in mirror.asked if file == name]
    assert len(mirror.asked) == len(FILES) - 1 + len(asked), "what is there isn't asked for again"
    if faults[-1] in ("cut", "silence", 503):
        half = (gpt2_folder / name).stat().st_size // 2
        assert int(asked[-1][6:-1]) >= half - 1, "what came isn't asked for again"


def test_a_part_longer_than_its_file_is_begun_anew(mirror, gpt2_folder, tmp_path, capsys):
    """It belongs to another file: the line says to run again, and that fetches all of this one."""
    (tmp_path / "124M").mkdir()
    (tmp_path / "124M" / f"{FILES[0]}.part").write_bytes(b"x" * 10_000)
    assert "again" in refusal(capsys, *mirror.command)
    run(capsys, *mirror.command)
    assert (tmp_path / "124M" / FILES[0]).read_bytes() == (gpt2_folder / FILES[0]).read_bytes()


OUTSIDE = ["http://192.0.2.1", "http://127.0.0.1@192.0.2.1", "http://127.0.0.1.example.com"]


@pytest.mark.parametrize("url", [*OUTSIDE, "ftp://127.0.0.1", "file:///etc", "nowhere"])
def test_only_https_or_this_very_machine_is_asked(url, mirror, capsys, connections):
    """Anything else is refused before a connection is made; the line says what is allowed."""
    line = refusal(capsys, *mirror.command, "--gpt2-url", url)
    assert url in line and "https" in line and connections == []


def test_several_processes_do_not_download_at_once(mirror, tmp_path, capsys, monkeypatch):
    """Under torchrun the weights have to be there; the line says how to get them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refusal(capsys, "train", *mirror.command[1:5], "--gpt2-url", mirror.url)
    assert "sample --gpt2" in line and mirror.asked == []


def test_no_network_is_one_line(mirror, capsys):
    """Nobody listens at the proxy, nor at this port: the line has the address, and the advice."""
    for url in ("https://192.0.2.1/models", "http://127.0.0.1:9/models"):
        line = refusal(capsys, *mirror.command, "--gpt2-url", url)
        assert f"{url}/124M/{FILES[0]}" in line and "again" in line


# ==================================================================================================
# 8 Command line

BOTH = "--help --gpt2 --gpt2-folder --gpt2-url --prompt --seed --device --dtype --compile "
OPTIONS = {
    "train": BOTH
    + "--data --val-fraction --tokenizer --size --context --n-layer --n-head --n-embd "
    "--dropout --from-scratch --steps --batch-size --accumulate --stride --learning-rate --warmup "
    "--weight-decay --clip --eval-every --save-every --sample-every --out --resume",
    "sample": BOTH + "--checkpoint --tokens --temperature --top-k --top-p --samples --ignore-eos "
    "--no-cache",
}


@pytest.fixture(scope="session")
def recital(gpt2_folder, tmp_path_factory):
    """sample, from a checkpoint that says "naïve ☕☕☕☕..." for ever; a ☕ is three tokens."""
    path, tokenizer = tmp_path_factory.mktemp("recital") / "model.pt", gpt.load_gpt2(gpt2_folder)[1]
    gpt.save_checkpoint(path, reciter(tokenizer.encode("naïve ☕☕☕"), VOCAB), tokenizer)
    return ["sample", "--checkpoint", str(path), "--prompt", "A", "--temperature", "0"]


@pytest.mark.parametrize("command", OPTIONS)
def test_help_lists_every_option(command, capsys):
    """train --help and sample --help are complete, and no mistake."""
    with pytest.raises(SystemExit, match="0"):
        gpt.main([command, "--help"])
    text = capsys.readouterr().out
    assert set(OPTIONS[command].split()) <= set(re.findall(r"--[\w-]+", text))
    defaults = {"train": "--dropout 0.0 --steps 280", "sample": "--tokens 100 --temperature 0.8"}
    for option, default in zip(*[iter(defaults[command].split())] * 2, strict=True):
        assert re.search(rf"^ *{option} [^-]*\[{re.escape(default)}\]", text, re.MULTILINE)


def test_the_text_goes_to_standard_output_and_the_figures_to_standard_error(recital, capsys):
    """sample prints how the prompt goes on, and closes with tokens, seconds, tokens per second."""
    printed = run(capsys, *recital, "--tokens", 43)
    assert printed.out.strip() in ("naïve " + 12 * "☕", "Anaïve " + 12 * "☕")
    assert re.search(r"\b43\b.*\d.*\bs.*\d.*tokens", printed.err.strip().splitlines()[-1])
    assert run(capsys, *recital, "--tokens", 43, "--no-cache").out == printed.out


def test_several_samples_are_printed_each_under_a_header(recital, capsys):
    """--samples 3 prints three texts, which differ when chance decides, as the seed has it."""
    printed = run(capsys, *recital, "--samples", 3, "--tokens", 13).out
    assert printed.count("naïve ☕☕") == 3 and len(printed.strip().splitlines()) >= 6
    assert run(capsys, *recital, "--samples", 2, "--tokens", 8).out.startswith("--- sample 1 ---")
    wild = [*recital, "--samples", 2, "--tokens", 40, "--temperature", 50, "--top-k", 200]
    one, same, other = (run(capsys, *wild, "--seed", seed).out for seed in (1, 1, 2))
    assert one == same == run(capsys, *wild, "--seed", 1, "--no-cache").out != other


def test_a_dash_reads_the_prompt_from_standard_input(recital, capsys, monkeypatch):
    """--prompt - reads all of it, and <|endoftext|> in it is one token: the special one."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"<|endoftext|>A"), "utf-8"))
    printed = run(capsys, *recital, "--prompt", "-", "--tokens", 6).out
    assert "aïve " in printed and "naïve" not in printed


def test_a_sample_stops_at_the_end_of_text_token(recital, gpt2_folder, tmp_path, capsys):
    """<|endoftext|> stops a sample and isn't printed; with --ignore-eos the sample goes on."""
    tokenizer = gpt.load_gpt2(gpt2_folder)[1]
    tokens = tokenizer.encode("one<|endoftext|>two", allowed_special="all")
    gpt.save_checkpoint(tmp_path / "model.pt", reciter(tokens, VOCAB), tokenizer)
    command = [*recital, "--checkpoint", tmp_path / "model.pt", "--tokens", 7]
    printed = run(capsys, *command).out
    assert "one" in printed and "two" not in printed and "endoftext" not in printed
    assert "two" in run(capsys, *command, "--ignore-eos").out


def test_text_streams_piece_by_piece_and_no_character_is_broken(recital):
    """A sample that never ends comes through a pipe as it is made, in whole characters."""
    command = [sys.executable, HERE / "gpt.py", *recital, "--tokens", str(10**9)]
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, env=usual, stdout=subprocess.PIPE) as process:
        alarm = threading.Timer(60, process.kill)
        alarm.start()
        pieces = []
        while sum(map(len, pieces)) < 100 and (piece := os.read(process.stdout.fileno(), 65536)):
            pieces.append(piece)
        assert process.poll() is None, "it would go on for ever"
        process.kill()
        alarm.cancel()
    assert "naïve ☕☕☕☕☕" in "".join(piece.decode("utf-8") for piece in pieces)
    assert max(map(len, pieces)) < 4096, "a buffer of 8 KB was filled first"


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run(what, lesson, tmp_path, capsys, monkeypatch):
    """The line has the step and the advice; the last good checkpoint stays."""
    path, real = tmp_path / "out" / "checkpoint.pt", gpt.cross_entropy
    run(capsys, *lesson, *RUN, "--steps", 2)
    if what == "loss":  # weights so large that the logits overflow
        model, tokenizer, state = gpt.load_checkpoint(path)
        model.load_state_dict({name: 1e30 * w for name, w in model.state_dict().items()})
        gpt.save_checkpoint(path, model, tokenizer, state)

    def broken(logits, targets):
        if what == "gradient" and logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * math.nan)
        return real(logits, targets)

    monkeypatch.setattr(gpt, "cross_entropy", broken)
    before, again = path.read_bytes(), ["train", "--resume", "--out", tmp_path / "out"]
    line = refusal(capsys, *again, "--steps", 9, "--save-every", 1)
    assert re.search(r"step 3\b", line) and "--learning-rate" in line
    assert path.read_bytes() == before


def test_a_model_with_nan_weights_is_refused(recital, tmp_path, capsys):
    """NaN among the weights: sample ends with one line, greedy or not, with the cache or not."""
    model, tokenizer, _ = gpt.load_checkpoint(recital[2])
    with torch.no_grad():
        next(model.parameters())[:, 0] = math.nan
    gpt.save_checkpoint(tmp_path / "nan.pt", model, tokenizer)
    for options in (["--temperature", 0], ["--temperature", 1, "--no-cache"], ["--samples", 3]):
        assert "finite" in refusal(capsys, "sample", "--checkpoint", tmp_path / "nan.pt", *options)


@pytest.fixture(scope="session")
def desk(gpt2_folder, tmp_path_factory):
    """A folder with a run of 2 steps in out/, and files that are wrong in every way."""
    folder = tmp_path_factory.mktemp("desk")
    files = {
        "story.txt": LESSON.encode(),
        "latin.txt": "naïve".encode("latin-1"),
        "short.txt": b"!",
    }
    files |= {"empty.txt": b"", "empty.bin": b"", "odd.bin": bytes(99), "short.bin": b"!!"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    shutil.copytree(gpt2_folder, folder / "gpt2" / "124M")
    gpt.load_gpt2(folder / "gpt2" / "124M")
    command = (
        f"train --data {folder}/story.txt --out {folder}/out --tokenizer 280 --steps 2 {SMALL}"
    )
    gpt.main(command.split())
    (folder / "weights").mkdir()
    shutil.copy(folder / "out" / "best.pt", folder / "weights" / "checkpoint.pt")
    return folder


COUNTS = "steps batch-size accumulate context stride n-layer n-head n-embd eval-every save-every"
WRONG_NUMBERS = {  # options: what they can't be
    f"train {COUNTS} sample-every": "0 -1 1.5 nan",
    "train warmup seed": "-1 0.5 inf",
    "train val-fraction dropout": "-0.1 1 nan",
    "train learning-rate weight-decay clip": "-1 nan inf",
    "sample tokens top-k samples": "-1 0.5 nan x",
    "sample temperature": "-1 nan inf",
    "sample top-p": "-0.1 1.1 nan",
    "sample seed": "-1 2e9",
}
NEW, GPT2 = f"train --data story.txt --tokenizer 280 {SMALL} --out", "train --data story.txt --gpt2"
ABSENT = "mps" if torch.cuda.is_available() else "cuda"
MISTAKES = {  # the command: what its line has to name, a regular expression
    "": "command",
    "trian": "trian",
    "train surplus": "surplus",
    "train --step 5": "--step 5",
    "sample --tok 5": "--tok 5",
    f"{NEW} new --size huge": "huge.*124M",
    f"{NEW} new --device {ABSENT}": f"{ABSENT}.*cpu",
    f"sample --device {ABSENT}": f"{ABSENT}.*cpu",
    f"{NEW} new --dtype float8": "float8.*bfloat16",
    f"{NEW} new --tokenizer bpe": "bpe.*gpt2",
    f"{NEW} new --tokenizer 256": r"\b256\b",
    f"{NEW} new --tokenizer ''": "tokenizer",
    f"{NEW} new --n-embd 32 --n-head 3": r"(?=.*\b32\b).*\b3\b",
    f"{NEW} new --n-embd 1000000": "memory",
    f"{NEW} new --data missing.txt": "missing.txt",
    f"{NEW} new --data missing.bin --tokenizer gpt2": "missing.bin",
    f"{NEW} new --data weights": "weights",
    f"{NEW} new --data latin.txt": "latin.txt.*UTF-8",
    f"{NEW} new --data empty.txt": r"empty.txt.*\b0 tokens.*\b17\b",
    f"{NEW} new --data short.txt": r"short.txt.*\b1 tokens.*\b17\b",
    f"{NEW} new --data short.bin --tokenizer gpt2": r"short.bin.*\b1 tokens.*\b17\b",
    f"{NEW} new --data empty.bin --tokenizer gpt2": "empty.bin",
    f"{NEW} new --data odd.bin --tokenizer gpt2": r"odd.bin.*\b99\b",
    f"{NEW} new --data odd.bin --tokenizer 300": "tokenizer",
    f"{NEW} new --val-fraction 0.98": r"story.txt.*\b17\b",
    f"{NEW} out --context 9999": r"story.txt.*\b10000\b",
    f"{NEW} story.txt/new": "story.txt/new",
    f"{NEW} story.txt": "story.txt",
    f"{GPT2} 125M": "125M.*124M",
    f"{GPT2} 124M --n-layer 2": "--gpt2.*n.layer",
    f"{GPT2} 124M --size 355M": "--gpt2.*size",
    f"{GPT2} 124M --tokenizer 300": "--gpt2.*tokenizer",
    f"{GPT2} 124M --out new --context 17": r"\b17\b.*\b16\b",
    "train --resume --out nowhere": "nowhere/checkpoint.pt",
    "train --resume --out weights": "weights/checkpoint.pt.*resume",
    "train --resume --steps 1": r"\b1\b.*\b2\b",
    "train --resume --steps 9 --dropout 0.5": "dropout",
    "train --resume --learning-rate 0.5": "learning.rate",
    "train --resume --data short.txt": "data",
    "train --resume --from-scratch": "from.scratch",
    "train --resume --gpt2 124M": "gpt2",
    "train --resume --batch-size 3": r"\b4\b",
    "sample --gpt2 124M --checkpoint out/best.pt": "--gpt2.*--checkpoint",
    "sample --checkpoint missing.pt": "missing.pt",
    "sample --checkpoint weights": "weights",
    "sample --checkpoint story.txt": "story.txt",
} | {
    f"{command} --{option} {value}": f"--{option}.*{re.escape(value)}"
    for options, values in WRONG_NUMBERS.items()
    for command, *numbers in [options.split()]
    for option, value in itertools.product(numbers, values.split())
}


@pytest.mark.parametrize("command", MISTAKES, ids=lambda command: command.replace(NEW, "train"))
def test_a_mistake_is_one_line_that_says_what_was_given(command, desk, capsys, monkeypatch):
    """`gpt.py: error: ...`, status 2, no traceback; no file is touched, no run moved away."""
    monkeypatch.chdir(desk)
    before = {path: path.stat().st_mtime_ns for path in desk.rglob("*")}
    with pytest.raises(SystemExit, match="2"):
        run(capsys, *shlex.split(command))
    error = capsys.readouterr().err
    assert error.startswith("gpt.py: error: ") and error.count("\n") == 1
    assert re.search(MISTAKES[command], error), error
    assert {path: path.stat().st_mtime_ns for path in desk.rglob("*")} == before


def test_an_earlier_run_is_moved_out_of_the_way(lesson, tmp_path, capsys):
    """The same command three times: out, out.1, out.2; a line says so, and every byte is kept."""
    contents = []
    for n in range(3):
        printed = run(capsys, *lesson, *RUN, "--steps", 2, "--seed", n).err
        assert (f"out.{n}" in printed) == (n > 0)
        contents.append({f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()})
    for content, name in zip(contents, ("out.1", "out.2", "out"), strict=True):
        assert {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} == content
    assert contents[0].keys() == {"checkpoint.pt", "best.pt", "log.csv"}


PROMPTS = ["", "\n", "naïve ☕ \U0001f600 \x00 日本語", "<|endoftext|>", "word " * 99]


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: ascii(prompt[:9]))
def test_any_prompt_works(prompt, desk, lesson, capsys):
    """Empty, of any Unicode, longer than the window: in sample, and in the samples of train."""
    command = ["sample", "--checkpoint", desk / "out" / "checkpoint.pt", "--prompt", prompt]
    assert "5 tokens" in run(capsys, *command, "--tokens", 5, "--ignore-eos").err
    run(capsys, *lesson, "--tokenizer", 280, "--steps", 1, "--prompt", prompt)


def test_a_closed_pipe_is_no_error(recital):
    """Into `head`, streaming or not: no line but the figures. A mistake: its line, and status 2."""
    endless = start(HERE / "gpt.py", *recital, "--tokens", 10**6)
    several = start(HERE / "gpt.py", *recital, "--tokens", 9, "--samples", 2)
    several.stdout.close()
    mistaken = start(HERE / "gpt.py", "sample", "--checkpoint", "missing.pt")
    assert len(endless.stdout.read(10)) == 10
    endless.stdout.close()
    for process in (endless, several):
        error = process.stderr.read()
        assert not re.search("Traceback|Exception|[Ee]rror|[Bb]roken", error), error
        assert process.wait(60) in (0, -signal.SIGPIPE, 128 + signal.SIGPIPE)
    output, error = mistaken.communicate(timeout=60)
    assert (output, mistaken.returncode, error.count("\n")) == ("", 2, 1)
    assert re.match(r"gpt\.py: error: .*missing\.pt", error)
