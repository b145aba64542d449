"""What is true of a GPT and of the program around it, in the order of gpt.py. Each test knows the
answer in a way of its own: from NumPy in float64, by counting, from TensorFlow. None goes online.
Tests that need GPT-2's vocabulary or OpenAI's weights are skipped where those aren't at hand."""

import collections
import contextlib
import csv
import functools
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # keeps TensorFlow silent
os.environ["http_proxy"] = os.environ["https_proxy"] = "http://127.0.0.1:9"  # no proxy is there
os.environ |= {"no_proxy": "127.0.0.1", "PYTHONUNBUFFERED": ""}
os.environ |= {"OMP_NUM_THREADS": "4", "GOMP_SPINCOUNT": "5000"}  # for other processes

import numpy as np
import pytest
import regex
import tiktoken
import torch
import torch.nn.functional as F
from tiktoken_ext.openai_public import r50k_pat_str  # how OpenAI's own encoder cuts words
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gpt

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's own
torch.set_num_threads(1)  # these models are too small to be shared by several cores
HERE = Path(gpt.__file__).parent
SOURCE = Path(gpt.__file__).read_text(encoding="utf-8")
README = (HERE / "README.md").read_text(encoding="utf-8")
MAKE_BIN, *RECIPES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
CS336 = HERE.parent / "shared" / "cs336"
os.environ["PYTHONPATH"] = str(HERE)  # for other processes
TINY = gpt.GPTConfig(vocab_size=61, context_length=12, n_embd=24, n_head=3, n_layer=2)
DEEP = gpt.GPTConfig(vocab_size=23, context_length=16, n_embd=12, n_head=3, n_layer=12)
LESSON = "The quick brown fox jumps over the lazy dog. " * 12
PACE = "--batch-size 4 --stride 12 --steps 2 --warmup 5 --eval-every 20 --save-every 80"
COMMON = f"--data lesson.txt --val-fraction 0.1 --prompt Hey --device cpu {PACE}"
BARE = f"train {COMMON} --context 16 --n-layer 1 --n-head 2 --n-embd 32"
TRAIN = f"{BARE} --tokenizer 280"  # of an option given twice, the last one counts
ONE_WINDOW = f"{TRAIN} --stride 1000000 --batch-size 1"
SMALL = {"data": "lesson.txt", "tokenizer": 280, "context": 16, "n_embd": 12, "stride": 9999}
RESUME = "train --resume"
RECITE = "sample --checkpoint model.pt --device cpu --prompt A --temperature 0"
LAST = Path("out/checkpoint.pt")
GPT2 = gpt.GPT2_CONFIGS
both_arithmetics = pytest.mark.parametrize("by_hand", [False, True], ids=["kernels", "by hand"])
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="kills, or limits a file's size")


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
    """All that generate() yields, side by side: (B, count)."""
    return torch.stack(list(gpt.generate(model, prompt, count, **settings)), dim=1)


def continued(text, count, path=LAST, **settings):
    """What should be printed: a text and its continuation by the model of a checkpoint."""
    model, tokenizer, _ = gpt.load_checkpoint(path)
    model.token_embedding.data = model.token_embedding.data[: tokenizer.n_vocab]
    prompt = torch.tensor([tokenizer.encode(text)])
    tokens = continuation(model, prompt, count, **settings)[0].tolist()
    return text + tokenizer.decode(tokens) + "\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test works in a folder of its own, with the lesson in it."""
    monkeypatch.chdir(tmp_path)
    Path("lesson.txt").write_text(LESSON)


def run(capsys, command, *more):
    """What `python gpt.py COMMAND MORE` writes to standard output (.out) and error (.err)."""
    capsys.readouterr()
    gpt.main([*shlex.split(command), *more])
    return capsys.readouterr()


def refusal(capsys, command, *more, status=2):
    """The last line on standard error, of a command that ends with this status."""
    with pytest.raises(SystemExit) as ending:
        run(capsys, command, *more)
    error = capsys.readouterr().err
    assert ending.value.code == status and "Traceback" not in error
    assert error.splitlines()[-1].startswith("gpt.py: error: " if status == 2 else "gpt.py: ")
    return error.splitlines()[-1]


def fork(command, rows=None):
    """`python gpt.py COMMAND` in a process of its own, killed once log.csv has so many rows."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpt", "torch._dynamo"])
    process = context.Process(target=gpt.main, args=(command.split(),))
    process.start()
    while rows is not None and process.is_alive():
        if len(log()) >= rows:
            process.kill()
        time.sleep(0.01)
    process.join()


def log(out="out"):
    """The rows of log.csv as dicts, without the speed, which no two runs share."""
    if not Path(out, "log.csv").exists():
        return []
    with open(Path(out, "log.csv"), newline="") as file:
        return [row | {"tokens_per_second": None} for row in csv.DictReader(file)]


def column(name, out="out"):
    return np.array([float(row[name]) for row in log(out)])


def parameters(model):
    """All of them, side by side."""
    return torch.nn.utils.parameters_to_vector(model.parameters())


def weights(path=LAST):
    return parameters(gpt.load_checkpoint(path)[0])


def training_state(out="out"):
    return gpt.load_checkpoint(out)[2]


def first_means(out="out"):
    """AdamW's running means of the gradients, of all parameters side by side."""
    states = training_state(out)["optimizer"]["state"]
    return torch.cat([states[number]["exp_avg"].flatten() for number in sorted(states)])


def save_reciter(text):
    """Save, as model.pt, a GPT that writes the n-th byte of the text at position n, come what may."""
    tokenizer = gpt.load_tokenizer(257, text)  # a token for each byte, and <|endoftext|>
    tokens = tokenizer.encode(text, allowed_special="all")
    model = random_model(gpt.GPTConfig(257, len(tokens), n_embd=64, n_head=1, n_layer=1))
    directions = F.normalize(torch.randn(257, 64))
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        model.token_embedding.copy_(directions)
        model.position_embedding.copy_(100 * directions[torch.tensor(tokens)])
    gpt.save_checkpoint("model.pt", model, tokenizer)


def softmax(x):
    """In NumPy, over the last axis."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def numpy_attention(q, k, v):
    """(scores, weights, result) by the formula: query i is token S - T + i and sees up to it."""
    T, S = q.shape[-2], k.shape[-2]
    scores = q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(T, S, S - T, dtype=bool), scores, -np.inf)
    return scores, softmax(scores), softmax(scores) @ v


def numpy_stream(variables, tokens, config):
    """What GPT-2's head reads, by the papers' equations, in float64: (B, T) -> (B, T, C)."""

    def norm(x, name):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)
        return x * variables[f"{name}/g"] + variables[f"{name}/b"]

    def linear(x, name):
        return x @ variables[f"{name}/w"] + variables[f"{name}/b"]

    B, T = tokens.shape
    x = variables["wte"][tokens] + variables["wpe"][:T]
    for n in range(config.n_layer):
        joint = linear(norm(x, f"h{n}/ln_1"), f"h{n}/attn/c_attn")  # (B, T, 3C)
        heads = joint.reshape(B, T, 3, config.n_head, -1)
        q, k, v = heads.transpose(2, 0, 3, 1, 4)  # (B, H, T, D) each
        result = numpy_attention(q, k, v)[2].transpose(0, 2, 1, 3)  # (B, T, H, D)
        x = x + linear(result.reshape(x.shape), f"h{n}/attn/c_proj")
        u = linear(norm(x, f"h{n}/ln_2"), f"h{n}/mlp/c_fc")
        gelu = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
        x = x + linear(gelu, f"h{n}/mlp/c_proj")
    return norm(x, "ln_f")


def numpy_loss(logits, targets):
    """The mean of -log softmax(logits)[target]: (..., V), (...) -> a number."""
    return -np.log(np.take_along_axis(softmax(logits), targets[..., None], axis=-1)).mean()


def numpy_slopes(loss, variables):
    """{variable: how the loss grows with each of its numbers}, measured by moving each a little."""
    slopes = {name: np.zeros_like(variable) for name, variable in variables.items()}
    for name, variable in variables.items():
        for place in np.ndindex(variable.shape):
            before = variable[place]
            for move in (1e-6, -1e-6):
                variable[place] = before + move
                slopes[name][place] += loss(variables) / (2 * move)
            variable[place] = before
    return slopes


def write_gpt2(path, config, variables=None):
    """Write OpenAI's file, by default with random numbers; returns {variable: float64 array}."""
    C = config.n_embd
    shapes = {"wte": [config.vocab_size, C], "wpe": [config.context_length, C]}
    shapes |= {"ln_f/g": [C], "ln_f/b": [C]}
    for n in range(config.n_layer):
        layers = {"attn/c_attn": [C, 3 * C], "attn/c_proj": [C, C]}
        layers |= {"mlp/c_fc": [C, 4 * C], "mlp/c_proj": [4 * C, C]}
        for name, shape in layers.items():
            shapes |= {f"h{n}/{name}/w": shape, f"h{n}/{name}/b": shape[-1:]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h{n}/{name}/g": [C], f"h{n}/{name}/b": [C]}
    rng = np.random.default_rng(0)
    variables = variables or {name: rng.normal(0, 0.5, shapes[name]) for name in shapes}
    variables = {name: variables[name].astype("<f4") for name in sorted(variables)}
    Path(path).write_bytes(b"".join(variable.tobytes() for variable in variables.values()))
    return {name: variable.astype(float) for name, variable in variables.items()}


def assert_close(actual, expected, tolerance, hint=""):
    """No number differs by more than the tolerance times the largest number that is expected."""
    actual = torch.as_tensor(actual).detach().double().numpy()
    expected = torch.as_tensor(expected).detach().double().numpy()
    assert actual.shape == expected.shape, hint
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max(), hint


@pytest.fixture
def vocabulary():
    """GPT-2's tokenizer, where tiktoken has it or can get it."""
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError as error:
        pytest.skip(f"tiktoken can't get GPT-2's vocabulary: {error}")


# ==================================================================================================
# 1 Config
def test_gpt2_has_the_published_number_of_parameters():
    """The output head is tied to the token embedding and has none of its own."""
    counts = [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]
    for config, count in zip(GPT2.values(), counts, strict=True):
        with torch.device("meta"):  # shapes without memory
            model = gpt.GPT(config)
        assert sum(parameter.numel() for parameter in model.parameters()) == count
        assert config.n_embd == 64 * config.n_head


def test_an_impossible_shape_is_refused():
    """Sizes are whole numbers from 1 up, heads share the channels evenly, dropout is below 1."""
    sizes = ("vocab_size", "context_length", "n_embd", "n_head", "n_layer")
    wrong = [*itertools.product(sizes, [0, -1, 1.5, math.nan, None, "x"]), ("n_head", 5)]
    wrong += [("dropout", 1.0), ("dropout", -0.1), ("dropout", math.nan)]
    for name, value in wrong:
        with pytest.raises(gpt.UserError, match=f"{name}.*{value}"):
            gpt.GPTConfig(**{name: value})
    assert type(gpt.GPTConfig(np.uint16(257)).vocab_size) is int


# ==================================================================================================
# 2 Layers
def test_attention_is_the_formula_of_the_paper():
    """In the table above attention(), and for the last T of 5 tokens, also with huge scores."""
    pair = r"\([\d.]+, [\d.]+\)"
    lines = [line for line in SOURCE.splitlines() if len(re.findall(pair, line)) == 4]
    table = [re.findall(r"-inf|[\d.]+", line.replace("∞", "inf")) for line in lines]
    q, k, v, *shown = np.split(np.array(table, dtype=float), [2, 4, 6, 9, 12], axis=1)
    for columns, expected in zip(shown, numpy_attention(q, k, v), strict=True):
        np.testing.assert_allclose(columns, expected, atol=0.0051)  # two decimals are shown
    torch.manual_seed(0)
    for T, scale in itertools.product((1, 2, 5), (1, 30)):
        q, k, v = torch.randn(3, 2, 3, 5, 8, dtype=torch.float64) * scale
        expected = numpy_attention(q[:, :, -T:].numpy(), k.numpy(), v.numpy())[2]
        hint = "does query i see tokens 0 to S - T + i, and no others?"
        assert_close(gpt.attention(q[:, :, -T:], k, v), expected, 1e-10, hint)


def test_the_hand_written_arithmetic_is_that_of_the_kernels():
    """The logits and the gradient of every parameter agree."""
    tokens = random_tokens(3, 17, below=DEEP.vocab_size)
    models = [random_model(DEEP, by_hand=by_hand).double() for by_hand in (False, True)]
    logits = [model(tokens[:, :-1]) for model in models]
    assert_close(logits[1], logits[0], 1e-12, "the logits by hand differ from the kernels'")
    for scores in logits:
        gpt.cross_entropy(scores, tokens[:, 1:]).backward()
    for (name, ours), kernels in zip(models[1].named_parameters(), models[0].parameters()):
        hint = f"the gradient of {name} is different by hand"
        torch.testing.assert_close(ours.grad, kernels.grad, rtol=1e-9, atol=1e-12, msg=hint)


@both_arithmetics
def test_no_token_sees_later_ones(by_hand):
    """Changing token t changes the logits from t on, and leaves those before t as they were."""
    model = random_model(by_hand=by_hand)
    tokens = random_tokens(2, 12)
    for t in range(12):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % TINY.vocab_size
        same = (model(changed) == model(tokens)).all(dim=-1)  # (B, T)
        assert same[:, :t].all(), f"tokens before {t} see token {t}: is the mask shifted by one?"
        assert not same[:, t:].any(), f"from {t} on, tokens have to see token {t}"


@both_arithmetics
def test_dropout_acts_in_four_places_and_in_training_only(by_hand):
    """On the embeddings, on the attention weights, and on what both layers add to the stream.
    If all keys are equal, all weights are, and with x and v the identity they are the result."""
    config = gpt.GPTConfig(61, context_length=64, n_embd=64, n_head=1, n_layer=1, dropout=0.3)
    model = random_model(config, by_hand=by_hand)
    block = model.blocks[0]
    attention = block.attention
    for linear in (attention.query, attention.key, attention.value, attention.projection):
        torch.nn.init.zeros_(linear.bias)
        torch.nn.init.eye_(linear.weight)
    torch.nn.init.zeros_(block.attention.key.weight)
    model.blocks = torch.nn.ModuleList()
    model.final_norm = torch.nn.Identity()
    model.head = model.final_norm.forward  # only the embeddings are left
    cases = [(block.feed_forward, torch.randn(500, 1, 64), 0.7), (model, random_tokens(8, 64), 0.7)]
    cases.append((block.attention, torch.eye(64).expand(20, 64, 64), 0.7**2))  # two of the places
    for layer, x, kept in cases:
        plain = layer.eval()(x)
        dropped = layer.train()(x)[plain != 0]
        plain = plain[plain != 0]
        margin = 5 * math.sqrt(kept * (1 - kept) / len(plain))  # five standard deviations
        share = (dropped != 0).double().mean().item()
        assert share == pytest.approx(kept, abs=margin), "is dropout at work here?"
        torch.testing.assert_close(dropped[dropped != 0], plain[dropped != 0] / kept)


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
            deviation = 0.02 / math.sqrt(2 * 8) if "projection" in name else 0.02
            assert parameter.std().item() == pytest.approx(deviation, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.05 * deviation, name


def test_the_loss_is_the_mean_of_minus_the_logarithm_of_the_probability():
    """Also where exp(logit) is infinite; and 16 bits are widened: bfloat16 would round ln 1000."""
    logits = np.random.default_rng(0).normal(size=(4, 5, 11))
    logits[0] *= 10_000
    targets = logits.argmax(axis=-1)  # where logits are huge, all other tokens have probability 0
    targets[1:] = random_tokens(3, 5, below=11)
    loss = gpt.cross_entropy(torch.tensor(logits), torch.tensor(targets))
    assert loss.item() == pytest.approx(numpy_loss(logits, targets), rel=1e-12)
    loss = gpt.cross_entropy(torch.zeros(1000, dtype=torch.bfloat16), torch.tensor(7))
    assert loss.item() == pytest.approx(math.log(1000), rel=1e-6)


def test_the_gradient_of_every_parameter_is_the_measured_one():
    """NumPy moves each number a little. Token 4 is never read: it learns through the head alone."""
    config = gpt.GPTConfig(vocab_size=5, context_length=4, n_embd=4, n_head=2, n_layer=2)
    variables = write_gpt2("gpt2.data", config)
    tokens = np.array([[0, 1, 0, 3], [2, 2, 3, 0]])
    targets = np.array([[1, 4, 3, 0], [2, 3, 0, 1]])
    model = gpt.load_gpt2("gpt2.data", config).double()
    gpt.cross_entropy(model(torch.tensor(tokens)), torch.tensor(targets)).backward()
    logits = lambda moved: numpy_stream(moved, tokens, config) @ moved["wte"].T  # tied
    loss = lambda moved: numpy_loss(logits(moved), targets)
    write_gpt2("slopes.data", config, numpy_slopes(loss, variables))
    slopes = gpt.load_gpt2("slopes.data", config).state_dict()  # each number is a slope
    for name, parameter in model.named_parameters():
        hint = f"the gradient of {name} isn't how much the loss really grows with it"
        np.testing.assert_allclose(parameter.grad, slopes[name], 1e-5, 1e-7, err_msg=hint)


def test_only_tokens_that_have_a_place_are_read():
    """12 fit into the context, and a cache that isn't empty takes one at a time."""
    model = random_model()
    cache = gpt.KVCache(model.config)
    model(random_tokens(2, 9), cache)
    for T, message in ((4, "13 .*12"), (2, "2 tokens .*empty")):
        with pytest.raises(gpt.UserError, match=message):
            model(random_tokens(2, T), cache)


# ==================================================================================================
# 4 Data
def test_words_are_cut_as_openais_encoder_cuts_them():
    """Merging never crosses a word boundary, so these decide what a token can be."""
    text = """I'd say 42! it's don't we're I've I'm we'll I'd 's't're've'm'll'd IT'S o'clock y'all
    a1b22 3.14 Ⅷ²½ ٣٤ 10th _x_ __init__ naïve café Ça 日本語 ☕☕ 👍🏽 e\u0301 two  three   spaces \t
    \n\n line \r\n end   'quoted' ("s") -- ... !? $5 #tag @me a/b\\c <x|> \u00a0nbsp\u2003em """
    assert regex.findall(gpt.WORDS, text) == regex.findall(r50k_pat_str, text)


def test_the_worked_example_of_byte_pairs_is_right():
    """The docstring of train_bpe() shows three tokens that are learned, and how a word is cut."""
    docstring = " ".join(gpt.train_bpe.__doc__.split())
    text = " hug hug hugs pug"
    ranks = gpt.train_bpe(text, 259)
    assert f'"{text}"' in docstring and '" hugging" becomes " hug" g i n g' in docstring
    assert gpt.make_tokenizer(ranks).encode(" hugging") == [258, *b"ging"]
    for number, token in enumerate(["ug", "hug", " hug"], start=256):
        line = f'{text.count(token)} times,? becomes token {number}, "{token}"'
        assert re.search(line, docstring) and ranks[token.encode()] == number


def naive_bpe(text, vocab_size):
    """Byte-pair learning that counts all pairs anew for each merge."""
    words = []
    for document in text.split("<|endoftext|>"):
        for word in regex.findall(r50k_pat_str, document):
            words.append([bytes([byte]) for byte in word.encode()])
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < vocab_size and any(len(word) > 1 for word in words):
        pairs = collections.Counter(itertools.chain(*map(itertools.pairwise, words)))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[best[0] + best[1]] = len(ranks)
        for word in words:
            for i in range(len(word)):
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
    return ranks


def test_counting_only_what_changes_is_counting_anew():
    """On random texts, with many equal counts, repeated letters and bytes that are half a letter.
    <|endoftext|> is one token, the last, and nothing is learned from its letters or across it."""
    rng = np.random.default_rng(0)
    parts = [*"aaabbé1' \n", "ab", "aaaa", " the", "'ll", "<|endoftext|>", "☕"]
    for length in [10, 30, 60, 120] * 12:
        text = "".join(rng.choice(parts, size=length))
        assert list(gpt.train_bpe(text, 320).items()) == list(naive_bpe(text, 320).items()), text
    text = "ab<|endoftext|>" * 9
    options = gpt.TrainOptions(context=2, val_fraction=0)
    windows, _ = gpt.make_windows(text, gpt.load_tokenizer(260, text), gpt.GPTConfig(), options)
    assert windows[0][0].tolist() == [256, 257]


@pytest.mark.skipif(not CS336.exists(), reason="../shared/cs336 is not at hand")
def test_the_merges_that_stanford_publishes_come_out():
    """CS336's text and 243 merges, in which a byte is written as in GPT-2's own files."""
    byte_of = {chr(byte): byte for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    others = [byte for byte in range(256) if byte not in byte_of.values()]
    byte_of |= {chr(256 + place): byte for place, byte in enumerate(others)}
    merges = (CS336 / "train-bpe-reference-merges.txt").read_text(encoding="utf-8").splitlines()
    expected = [bytes(byte_of[sign] for sign in line.replace(" ", "")) for line in merges]
    text = (CS336 / "corpus.en").read_text(encoding="utf-8")
    assert len(expected) == 243 and list(gpt.train_bpe(text, 499))[256:] == expected


def test_offline_a_vocabulary_is_learned_unless_gpt2s_is_meant(capsys, monkeypatch):
    """A line says so. Where only GPT-2's will do, an error names the variable that helps."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "empty")
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # what was loaded before is forgotten
    assert gpt.load_tokenizer(None, str([*range(999)])).n_vocab == 1024
    assert "1,024 tokens" in capsys.readouterr().err
    Path("x.bin").write_bytes(b"x" * 100)
    train = "train --data lesson.txt"
    for command in (f"{train} --tokenizer gpt2", f"{train} --data x.bin", f"{train} --gpt2 124M"):
        assert "TIKTOKEN_CACHE_DIR" in refusal(capsys, command)


def test_text_is_the_same_from_a_file_a_pipe_or_a_prompt(capsys):
    """Lines end in \\n, and a byte-order mark is gone. What isn't UTF-8 text is refused."""
    for given in ("\ufeffé\r\nb\r☕\ufeff\n\n", "é\nb\n☕\ufeff\n\n"):
        Path("text").write_bytes(given.encode())
        assert gpt.read_data("text") == "é\nb\n☕\ufeff\n\n"
        assert gpt.SampleOptions(prompt=given).prompt == "é\nb\n☕\ufeff\n\n"
    for wrong in (b"caf\xe9", b"a\0b", "a".encode("utf-16"), "a".encode("utf-16-le"), b"\xe2\x98"):
        Path("text").write_bytes(wrong)
        with pytest.raises(gpt.UserError, match="--data text .*UTF-8"):
            gpt.read_data("text")
        with pytest.raises(gpt.UserError, match="--prompt .*UTF-8"):  # Python makes surrogates
            gpt.TrainOptions(prompt=wrong.decode("utf-8", "surrogateescape"))
    with pytest.raises(gpt.UserError, match="--data x .*white spaces"):  # too much for tiktoken
        gpt.clean_text("I" + " " * 999_999 + "HAD", "--data x")
    assert len(gpt.clean_text("I" + " " * 800_000 + "HAD", "--data x")) == 800_004
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe")  # can be read only once
        threading.Thread(target=Path("pipe").write_text, args=(LESSON,), daemon=True).start()
        run(capsys, f"{TRAIN} --data pipe")


def test_a_bin_file_is_what_it_claims_to_be(capsys, monkeypatch):
    """Each of these isn't. nanoGPT leaves a meta.pkl beside numbers of characters."""
    wrong = {  # what the error says: the numbers of a .bin, and their type
        "zero .* uint16": ([15496, 11, 314, 716] * 9, "<u4"),
        "token 55,432.* header": ([20240520, 1, 100] + [0] * 253, "<u4"),  # llm.c's
        "token 50,257": ([50257] + [1] * (2**24 + 5), "<u2"),
        "token 60,000": ([1] * (2**24 + 5) + [50256, 60000], "<u2"),  # what one look doesn't reach
        "can't be read": ([65, 66, 67], "u1"),
        "holds characters": ([39, 1, 64] * 8, "<u2"),
    }
    Path("meta.pkl").touch()
    for message, (numbers, dtype) in wrong.items():
        path = f"{len(numbers)}.bin"
        np.array(numbers, dtype).tofile(path)
        with pytest.raises(gpt.UserError, match=f"--data {path} .*{message}"):
            gpt.check_tokens(gpt.read_data(path), path, 50257)
    tokenizer = gpt.load_tokenizer(280, LESSON)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tokenizer)
    np.full(100, 280, "<u2").tofile("new.bin")
    assert "token 280" in refusal(capsys, f"{BARE} --data new.bin")
    run(capsys, TRAIN)
    assert "token 280" in refusal(capsys, f"{RESUME} --steps 3 --data new.bin")


def test_a_bin_file_trains_as_the_text_that_it_was_made_from(vocabulary, capsys):
    """With the same losses, if it was made as the README says. What lies beside doesn't matter."""
    Path("my.txt").write_text(LESSON)
    Path("meta.pkl").touch()
    exec(MAKE_BIN, {})  # noqa: S102
    for data in ("tokens.bin", "my.txt"):
        run(capsys, f"{BARE} --data {data} --out {data}.out --tokenizer gpt2 --n-embd 8")
    assert log("tokens.bin.out") == log("my.txt.out")


def test_windows_slide_by_the_stride_and_targets_are_one_token_ahead():
    """Window i starts at i * stride; there are as many as fit together with their last target."""
    for length, stride, dtype in itertools.product((4, 5, 30), (1, 3, 7), ("<u2", np.int64)):
        tokens = np.arange(65_500, 65_500 + length).astype(dtype)
        windows = gpt.SlidingWindows(tokens, context_length=4, stride=stride)
        starts = range(0, length - 4, stride)
        for (inputs, targets), start in zip(windows, starts, strict=True):
            assert inputs.dtype == targets.dtype == torch.int64
            assert inputs.tolist() == tokens[start : start + 4].tolist()
            assert targets.tolist() == (tokens[start : start + 4] + 1).tolist(), "one token ahead?"


def test_validation_gets_the_end_and_training_never_sees_it():
    """Windows start --stride tokens apart, else 3/4 of the context. Those for validation are next
    to each other, or spread if there would be many more than 64; a short end is one window."""
    cases = [  # tokens, stride, share for validation: where the windows of both parts start
        (1000, None, 0.3, range(0, 692, 6), range(700, 992, 8)),
        (101, 900, 0.06, [0], [95]),
        (100, 5, 0.01, range(0, 91, 5), []),
        (100, 50, 0.08, [0, 50], [92]),
        (20_000, 1, 0.5, range(9_992), range(10_000, 19_992, 156)),
    ]
    for count, stride, share, *expected in cases:
        path = f"{count}.bin"
        np.arange(count).astype("<u2").tofile(path)
        options = gpt.TrainOptions(data=path, context=8, stride=stride, val_fraction=share)
        found = gpt.make_windows(gpt.read_data(path), None, gpt.GPTConfig(), options)
        for windows, starts in zip(found, expected, strict=True):
            assert [inputs[0] for inputs, _ in windows] == [*starts]
    options.context = 1025
    with pytest.raises(gpt.UserError, match="--context .*1025.*1024"):
        gpt.make_windows(gpt.read_data(path), None, gpt.GPTConfig(), options)


def test_memory_does_not_grow_with_the_data():
    """Of 400 MB of tokens, a fraction is in memory at any time; NumPy and Python count here."""
    Path("large.bin").write_bytes(b"\x01\x01" * 1000)
    os.truncate("large.bin", 400_000_000)
    options = gpt.TrainOptions(data="large.bin")
    tracemalloc.start()
    gpt.make_windows(gpt.read_data(options.data), None, gpt.GPTConfig(), options)[0][200_000]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000_000


# ==================================================================================================
# 5 Training
def test_the_first_run_learns_the_story_by_heart(capsys):
    """With all defaults, except that the vocabulary is learned, as it is offline."""
    torch.set_num_threads(2)
    printed = run(capsys, "train --tokenizer 1024 --device cpu").out
    torch.set_num_threads(1)
    assert column("train_loss")[0] > 6.5 and column("train_loss")[-1] < 0.5
    assert "Jack Gisburn rather a cheap genius--though a good fellow enough" in printed


def test_adamw_moves_each_parameter_as_defined(capsys):
    """By the paper's equations. A key's bias has a gradient of about 0: there, epsilon decides."""
    starts = []
    steps = []

    def record(optimizer, *_):
        moved = [p for group in optimizer.param_groups for p in group["params"]]
        starts.append([p.detach().double().numpy() for p in moved])
        steps.append([p.grad.double().numpy().copy() for p in moved])

    recording = register_optimizer_step_pre_hook(record)
    run(capsys, f"{TRAIN} --steps 4 --warmup 2 --learning-rate 0.01 --weight-decay 0.5")
    run(capsys, f"{ONE_WINDOW} --learning-rate 0 --clip 1e9 --out still")
    recording.remove()
    for first, second in zip(steps[4], steps[5], strict=True):
        assert np.array_equal(first, second), "a gradient was not cleared"
    expected = [0.005, 0.01, 0.0055, 0.001]  # half the highest, all of it, half-way down, a tenth
    assert column("learning_rate") == pytest.approx(expected)
    ends = gpt.load_checkpoint(LAST)[0].parameters()
    ends = sorted(ends, key=lambda parameter: parameter.dim() < 2)  # matrices first
    for start, end, gradients in zip(starts[0], ends, zip(*steps[:4]), strict=True):
        mean = square = 0.0
        for step, (rate, gradient) in enumerate(zip(expected, gradients), start=1):
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.95 * square + 0.05 * gradient**2
            start = start * (1 - rate * (0.5 if start.ndim >= 2 else 0))
            divisor = np.sqrt(square / (1 - 0.95**step)) + 1e-8
            start = start - rate * mean / (1 - 0.9**step) / divisor
        np.testing.assert_allclose(end.detach().numpy(), start, rtol=0, atol=1e-6)


@linux_only
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_that_is_killed_again_and_again_continues_to_the_bit(dtype, monkeypatch):
    """With dropout, accumulation and several threads. Its checkpoints are whole at any moment."""
    whole = f"{TRAIN} --dropout 0.2 --accumulate 2 --eval-every 1 --save-every 2"
    whole += f" --context 64 --n-embd 128 --steps 30 --seed 0 --dtype {dtype}"
    fork(f"{whole} --out whole")
    command = whole
    for rows in (2, 5, 10, 15):
        fork(command, rows=rows)
        assert len(log()) < 30, "it was to be killed before the end"
        assert training_state()["step"] <= len(log()) and len(weights("out/best.pt"))
        command = RESUME
    os.rename("out", "whole/out")
    monkeypatch.chdir("whole")
    fork(RESUME)
    assert log() == log(".") and len(log()) == 30
    assert training_state()["scaler"] == training_state(".")["scaler"]
    assert torch.equal(first_means(), first_means("."))
    for name in ("checkpoint.pt", "best.pt"):
        assert torch.equal(weights(f"out/{name}"), weights(name))


def test_windows_and_dropout_depend_on_the_seed_the_step_and_the_process_alone(capsys, monkeypatch):
    """Validation and the samples written in training do without dropout."""
    windows = gpt.SlidingWindows(torch.arange(9999), context_length=1, stride=1)
    drawn = collections.Counter()
    for seed, step in itertools.product((0, 0, 1), (1, 2)):
        options = gpt.TrainOptions(seed=seed)
        batches = gpt.draw_batches(windows=windows, step=step, options=options, device="cpu")
        drawn[str(batches)] += 1
    assert sorted(drawn.values()) == [1, 1, 2, 2]
    options = "--learning-rate 0 --dropout 0.5 --steps 9 --eval-every 2 --save-every 3"
    printed = run(capsys, f"{ONE_WINDOW} {options}").out
    assert len(set(column("train_loss"))) == 9, "with one window, only dropout differs"
    assert len({row["val_loss"] for row in log() if row["val_loss"]}) == 1
    assert printed == 3 * continued("Hey", 40, temperature=0)
    shutil.copytree("out", "other")
    for out, seed in (("out", 1), ("other", 2)):
        run(capsys, f"{RESUME} --steps 10 --seed {seed} --out {out}")
    assert column("train_loss")[-1] != column("train_loss", "other")[-1], "other masks"
    learned = []
    for rank in (0, 1):
        monkeypatch.setattr(gpt, "RANK", rank)
        given = {"batch_size": 1 + rank, "dropout": 0.5, "steps": 1, "out": f"out{rank}"}
        learned.append(gpt.train(gpt.TrainOptions(**SMALL, **given)))
    assert not torch.equal(*map(parameters, learned))


def test_a_batch_can_be_cut_into_micro_batches_and_processes(capsys):
    """8 windows, 4 twice, or 2 twice in each of two processes, of which only the first prints."""
    command = f"{TRAIN} --steps 4 --clip 1e9 --learning-rate 0.01 --out"
    run(capsys, f"{command} whole --batch-size 8")
    run(capsys, f"{command} halves --accumulate 2")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    split = [*command.split(), "pair", "--batch-size=2", "--accumulate=2"]
    done = subprocess.run([*torchrun, HERE / "gpt.py", *split], capture_output=True, check=True)
    assert done.stdout.count(b"Hey") == done.stderr.count(b"step 4/4") == 1
    for name in ("whole", "halves", "pair"):
        run(capsys, f"{RESUME} --batch-size 4 --accumulate 2 --steps 6 --out {name}")
        assert column("train_loss", name) == pytest.approx(column("train_loss", "whole"), abs=1e-5)
        torch.testing.assert_close(first_means(name), first_means("whole"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "factors"),
    [("float16", [1, 1e30, 1, math.nan]), ("float32", [1, 1, 1, 3e37])],
)
def test_divergence_stops_a_run_before_it_does_harm(dtype, factors, capsys, monkeypatch):
    """The model stays that of the last good step, in memory and on the disk. In float16, a gradient
    that is too large only skips a step and halves the scale factor."""
    options = gpt.TrainOptions(**SMALL, steps=4, save_every=1, val_fraction=0, dtype=dtype)
    start = gpt.new_run(options)
    left = iter(factors)
    real = gpt.cross_entropy
    with monkeypatch.context() as patch:
        patch.setattr(gpt, "cross_entropy", lambda *given: next(left) * real(*given))
        with pytest.raises(gpt.UserError, match="diverged.*--resume.*--learning-rate"):
            gpt.train(options, start)
    state = training_state()
    skipped = factors.count(1e30)
    assert state["step"] == 3 and torch.equal(parameters(start[0]), weights())
    assert state["optimizer"]["state"][0]["step"] == 3 - skipped and first_means().isfinite().all()
    assert state["scaler"].get("scale", 65536) == 65536 / 2**skipped
    run(capsys, f"{RESUME} --learning-rate 1e-9")
    *_, third, last = column("learning_rate")
    assert len(log()) == 4 and third > 1e-5 and last < 1e-8


def test_best_pt_has_the_lowest_validation_loss(capsys):
    """A resumed run remembers it."""
    Path("lesson.txt").write_text(2 * LESSON + "SPHINX OF BLACK QUARTZ, JUDGE MY VOW! 01234" * 2)
    command = f"{TRAIN} --warmup 99 --eval-every 1 --learning-rate 0.02 --steps"
    run(capsys, f"{command} 30")
    measured = [float(row["val_loss"]) for row in log()]
    assert min(measured) < measured[-1] - 0.1, "it was to rise at the end"
    run(capsys, f"{RESUME} --steps 31")
    lowest = measured.index(min(measured)) + 1
    run(capsys, f"{command} {lowest} --out again")
    assert torch.equal(weights("out/best.pt"), weights("again/checkpoint.pt"))


# ==================================================================================================
# 6 Decoding
LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.5, 1.2, -1.5, 0.5, 1.9])


def probabilities(p, temperature=1.0, top_k=None, top_p=None):
    """What the settings make of probabilities, one token after the other, in NumPy."""
    p = p ** (1 / temperature)
    p = p / p.sum()
    if top_k and top_k < len(p):
        p[p < np.sort(p)[-top_k]] = 0  # those equal to the k-th stay
        p = p / p.sum()
    total = 0.0
    for token in np.argsort(-p) if top_p else []:
        kept = p[token] if total < top_p else 0.0
        total += p[token]
        p[token] = kept
    return p / p.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),  # the 4th, 5th and 6th most probable tokens are equal
    [(1, None, None), (0.5, 0, 0), (2, 4, None), (0.5, 2, 0.6), (2, 4, 0.6), (1, 99, 1), (2, 1, 1)],
)
def test_tokens_are_drawn_with_the_probabilities_of_the_settings(temperature, top_k, top_p):
    """Temperature, then top-k with ties, then top-p, for each row by itself: we count draws."""
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([LOGITS, LOGITS.flip(0)])  # (2, V)
    drawn = gpt.sample_token(rows.repeat(20_000, 1), generator=generator, **settings)
    for row, tokens in zip(rows, drawn.view(20_000, 2).T, strict=True):
        expected = probabilities(torch.softmax(row.double(), dim=-1).numpy(), **settings)
        shares = np.bincount(tokens, minlength=len(row)) / 20_000
        np.testing.assert_allclose(shares, expected, atol=0.015)  # four standard deviations
        assert (shares[expected == 0] == 0).all()


def test_the_worked_example_of_sampling_is_right():
    """The table above sample_token() shows what each setting makes of four probabilities."""
    rows = re.findall(r"((?:  +[01](?:\.\d\d)?){4})\n", SOURCE)
    table = np.array([row.split() for row in rows], dtype=float)
    sharper = probabilities(table[0], temperature=0.5)
    three = probabilities(sharper, top_k=3)
    expected = [table[0], sharper, three, probabilities(three, top_p=0.8)]
    np.testing.assert_allclose(table, expected, atol=0.005)  # two decimals are shown


@both_arithmetics
@pytest.mark.parametrize("prompt_length", [1, 12, 31])
@pytest.mark.parametrize("longest", [12, 7, 1])
def test_generating_is_recomputing_everything(longest, prompt_length, by_hand):
    """Neither the cache nor other rows change a token, also where a full window is halved."""
    model = random_model(context_length=longest, by_hand=by_hand)
    prompt = random_tokens(3, prompt_length)
    said = continuation(model, prompt, 2 * longest + 5, temperature=0)
    for row, tokens in zip(prompt, said, strict=True):
        window = row[-longest:]
        for token in tokens:
            if len(window) > longest:
                window = window[-max(1, longest // 2) :]
            assert token == model(window[None])[0, -1].argmax(), "is the window halved elsewhere?"
            window = torch.cat([window, token[None]])


def test_generate_heeds_its_seed_and_numbers_at_the_edge():
    """Seed 0 is one, None gives a new text each time, and temperatures near 0 are greedy."""
    model = random_model()
    prompt = random_tokens(2, 3)
    seeds = (0, 0, 1, None, None)
    drawn = [continuation(model, prompt, 30, temperature=5.0, seed=seed) for seed in seeds]
    same = [torch.equal(*drawn[i : i + 2]) for i in range(4)]
    assert same == [True, False, False, False]
    token = next(gpt.generate(model, prompt, 1)).unsqueeze(1)
    gpt.cross_entropy(model(token), token).backward()  # one can learn from what was generated
    for temperature in (0, 1e-300, 1e-7, 1e-3):
        chosen = gpt.sample_token(torch.stack([LOGITS, -LOGITS]), temperature=temperature)
        assert chosen.tolist() == [0, 5]
    for wrong in (random_tokens(1, 0), random_tokens(3), "I HAD"):
        with pytest.raises(gpt.UserError, match="prompt.* tensor"):
            next(gpt.generate(model, wrong, 1))
    large = torch.tensor([[60_000.0, 65_000.0, -65_000.0]]).half()
    assert gpt.sample_token(large, temperature=0.1, top_k=2, top_p=0.9).tolist() == [1]


def test_every_row_ends_by_itself():
    """A row that has produced eos, which may be 0, continues with eos until all rows have."""
    settings = {"model": random_model(), "prompt": random_tokens(3, 2), "count": 99}
    settings |= {"temperature": 4.0, "seed": 3}
    free = continuation(**settings)
    for eos in (0, 7):
        ends = [row.index(eos) for row in free.tolist()]
        expected = free[:, : max(ends) + 1].clone()
        for row, end in zip(expected, ends, strict=True):
            row[end:] = eos
        assert torch.equal(continuation(**settings, eos=eos), expected)


def test_a_sample_has_any_prompt_and_stops_at_the_end_of_text(capsys, monkeypatch):
    """The prompt - is standard input without its last line end, in UTF-8 on every system."""
    save_reciter("one<|endoftext|>two")
    assert run(capsys, f"{RECITE} --prompt '<|endoftext|>'").out == "<|endoftext|>one\n"
    assert run(capsys, f"{RECITE} --tokens 7 --ignore-eos").out == "Aone<|endoftext|>two\n"
    typed = io.TextIOWrapper(io.BytesIO("\ufeffé\r\n☕\n".encode()), "latin-1")
    monkeypatch.setattr("sys.stdin", typed)
    assert run(capsys, f"{RECITE} --prompt - --tokens 1").out == "é\n☕w\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "latin-1"))
    assert "standard input isn't UTF-8" in refusal(capsys, f"{RECITE} --prompt -")
    for prompt in ("naïve 日本語", "word " * 99):
        assert run(capsys, f"{RECITE} --tokens 5 --prompt", prompt).out.startswith(prompt)
    model = random_model(vocab_size=257)
    gpt.save_checkpoint("model.pt", model, gpt.load_tokenizer(257, ""))
    empty, end = (run(capsys, f"{RECITE} --prompt", text).out for text in ("", "<|endoftext|>"))
    assert end == "<|endoftext|>" + empty


def test_text_streams_in_whole_characters_wherever_it_runs(monkeypatch):
    """In UTF-8, whatever the code page, and as it is made; when nobody reads on, the sample ends.
    gpt.py may be pasted into a notebook, run under python -OO, and do without TensorFlow."""
    save_reciter("naïve ☕☕☕")
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    code = "import sys; sys.modules['tensorflow'] = None; exec(open(sys.argv.pop(1), 'rb').read())"
    command = [sys.executable, "-OO", "-c", code, HERE / "gpt.py", *RECITE.split()]
    command += ["--tokens", "1000000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    read = b""
    while len(read) < 100:
        piece = os.read(process.stdout.fileno(), 65536)
        assert 0 < len(piece) < 4096, "it has ended, or a buffer of 8 KB was filled first"
        read += piece
    assert read.decode("utf-8", errors="ignore").startswith("Anaïve ☕☕☕☕")
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == b""


# ==================================================================================================
# 7 Weights
def test_openais_weights_give_openais_logits():
    """Every logit is that of the equations in float64."""
    variables = write_gpt2("gpt2.data", DEEP)
    model = gpt.load_gpt2("gpt2.data", DEEP, by_hand=True)
    tokens = random_tokens(2, 16, below=DEEP.vocab_size)
    expected = numpy_stream(variables, tokens.numpy(), DEEP) @ variables["wte"].T
    assert model.config == replace(DEEP, by_hand=True) and not model.training
    assert_close(model(tokens), expected, 1e-5)
    assert_close(model.double()(tokens), expected, 1e-12)
    assert_close(model(tokens, last_only=True), expected[:, -1:], 1e-12)


def test_the_weights_are_views_of_the_mapped_file_until_they_are_saved():
    """Nothing is copied, and the file never changes. A checkpoint is as large as its numbers."""
    write_gpt2("gpt2.data", DEEP)
    before = Path("gpt2.data").read_bytes()
    model = gpt.load_gpt2("gpt2.data", DEEP)
    assert len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()}) == 1
    maps = Path("/proc/self/maps")  # on Linux: what files a process has mapped
    assert not maps.exists() or str(Path("gpt2.data").absolute()) in maps.read_text()
    torch.nn.init.zeros_(model.token_embedding)
    assert Path("gpt2.data").read_bytes() == before
    gpt.save_checkpoint("model.pt", model, gpt.load_tokenizer(257, LESSON))
    held = torch.load("model.pt", mmap=True)["weights"].values()
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == len(before)


def test_tensorflow_writes_the_same_bytes_and_reads_the_same_numbers(tmp_path):
    """So the files that NumPy writes here have OpenAI's layout."""
    tensorflow = pytest.importorskip("tensorflow")
    v1 = tensorflow.compat.v1
    variables = write_gpt2("by_numpy", DEEP)
    with v1.Graph().as_default(), v1.Session() as session:
        for name in reversed(variables):
            v1.get_variable(f"model/{name}", initializer=variables[name].astype(np.float32))
        session.run(v1.global_variables_initializer())
        v1.train.Saver().save(session, str(tmp_path / "model.ckpt"), write_meta_graph=False)
    assert Path(gpt.GPT2_FILE).read_bytes() == Path("by_numpy").read_bytes()
    theirs = tensorflow.train.load_checkpoint(str(tmp_path / "model.ckpt"))
    assert theirs.get_variable_to_shape_map().keys() == {f"model/{name}" for name in variables}
    for name, variable in variables.items():
        assert np.array_equal(theirs.get_tensor(f"model/{name}"), variable), name


# What is known of the real GPT-2 124M. The same check runs on a stand-in, which NumPy knows.
REAL = HERE / "gpt2" / "124M" / gpt.GPT2_FILE
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


def check_known_outputs(load, texts, logits, mean, stream, loss, tokens, steps):
    """Greedy texts; logits at the last position; the mean of all; what the head reads first or last;
    a loss; the losses before ten steps of llm.c's optimizer, then of ours, on 4 rows of tokens."""
    model = load()
    for prompt, text in texts:
        said = list(gpt.generate(model, torch.tensor([prompt]), len(text), temperature=0))
        assert torch.cat(said).tolist() == text
    for read, expected in logits:
        found = model(torch.tensor([read]))[0, -1, list(expected)]
        assert found.tolist() == pytest.approx(list(expected.values()), abs=1e-3)
    read, expected = mean
    assert model(torch.tensor([read])).mean().item() == pytest.approx(expected, rel=1e-4)
    read, expected = stream
    ends = []
    model.final_norm.register_forward_hook(lambda layer, args, y: ends.extend(y[0, [0, -1]]))
    model(torch.tensor([read]))
    assert any(np.allclose(end[: len(expected)].tolist(), expected, 0, 0.01) for end in ends)
    read, expected = loss
    found = gpt.cross_entropy(model(torch.tensor([read[:-1]])), torch.tensor([read[1:]]))
    assert found.item() == pytest.approx(expected, abs=4e-5)
    batch = [torch.tensor(part).view(4, -1) for part in (tokens[:-1], tokens[1:])]
    settings = {"batches": [batch], "autocast": contextlib.nullcontext()}
    settings["scaler"] = torch.amp.GradScaler("cpu", enabled=False)
    optimizers = [
        lambda: torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), weight_decay=0.01),
        lambda: gpt.make_optimizer(model, weight_decay=0.0),
    ]
    for make_optimizer, (clip, expected, tolerance) in zip(optimizers, steps):
        model = load()
        optimizer = make_optimizer()
        for group in optimizer.param_groups:
            group["lr"] = 1e-4
        settings |= {"model": model, "optimizer": optimizer, "clip": clip}
        found = [gpt.training_step(**settings) for _ in range(10)]
        assert found == pytest.approx(expected, abs=tolerance)


def plain_steps(model, batch, betas, decay, clip):
    """The losses before ten steps of AdamW at a rate of 1e-4, with PyTorch's functions alone."""
    settings = {"lr": 1e-4, "betas": betas, "weight_decay": decay}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_check_of_known_outputs_holds_for_the_stand_in():
    """Texts, logits and the loss are as NumPy computes them, ten steps as PyTorch does."""
    config = gpt.GPTConfig(vocab_size=5, context_length=8, n_embd=4, n_head=2, n_layer=1)
    variables = write_gpt2("gpt2.data", config)
    tokens = random_tokens(9, below=5).tolist()
    stream = numpy_stream(variables, np.array([tokens[:8]]), config)[0]  # (T, C)
    logits = stream @ variables["wte"].T
    load = lambda: gpt.load_gpt2("gpt2.data", config)
    batch = [torch.tensor(part).view(4, 2) for part in (tokens[:8], tokens[1:])]
    check_known_outputs(
        load,
        texts=[(tokens[:T], [int(logits[T - 1].argmax())]) for T in range(1, 9)],
        logits=[(tokens[:8], dict(enumerate(logits[7])))],
        mean=(tokens[:8], logits.mean()),
        stream=(tokens[:8], stream[7]),
        loss=(tokens, numpy_loss(logits, np.array(tokens[1:]))),
        tokens=tokens,
        steps=[
            (math.inf, plain_steps(load().double(), batch, (0.9, 0.999), 0.01, math.inf), 1e-6),
            (0.1, plain_steps(load().double(), batch, (0.9, 0.95), 0.0, 0.1), 1e-6),
        ],
    )


@pytest.mark.skipif(not REAL.exists(), reason="OpenAI's 124M is not in gpt2/124M")
def test_the_real_gpt2_gives_its_known_outputs(vocabulary):
    """The file's SHA-256; texts, logits and losses that others have published."""
    with open(REAL, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert digest == "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118"
    tokens = shakespeare(vocabulary)
    digest = hashlib.sha256(np.array(tokens, dtype="<u2").tobytes()).hexdigest()
    assert digest == "f3cb1f678d40cf5a120662b12a20fdacc5bd2e08c13ebb230a93e9f6f82f1df4"
    turing = "Alan Turing theorized that computers would one day become"
    field = " was found in a field near the intersection of West and West Streets.\n\nThe dog"
    texts = [  # from picoGPT's README, the tests of transformers and of rust-bert
        (turing, " the most powerful machines on the planet."),
        ("The dog", field),
        ("Today, I", "'m going to be doing a lot of research on this. I"),
        ("Hello, my dog is a little", " bit of a mess. I'm not sure if he's going"),
        ("One two three four", " five"),
    ]
    hello = [-35.23624420, -35.32659531, -38.97534943, -39.39067459]
    hello += [-37.65318298, -38.67243576, -36.02489090, -36.48415375]
    hello = dict(enumerate(hello)) | {10000: -41.98722839, 50000: -44.11378098}
    theirs = [5.270007, 4.059707, 3.375123, 2.800783, 2.315382]
    theirs += [1.849029, 1.394656, 0.999147, 0.624080, 0.376511]
    ours = [5.270009, 4.060681, 3.320085, 2.717550, 2.181066]
    ours += [1.653923, 1.168050, 0.736873, 0.401021, 0.187493]
    check_known_outputs(
        lambda: gpt.load_gpt2(REAL, gpt.GPT2_CONFIGS["124M"]),
        texts=[vocabulary.encode_batch(list(pair)) for pair in texts],
        logits=[([15496], hello), ([3198, 734, 1115, 1440], {1936: -69.4948})],
        mean=([15496, 11, 314, 716], -111.89471436),  # an ONNX reference, as is the first above
        stream=([1169, 2068, 7586, 21831, 13], [-0.1116, -0.0375, -0.2624, 0.00891, -0.0061]),
        loss=([50256, *vocabulary.encode("Hello world!")], 5.331855773925781),  # TransformerLens
        tokens=tokens,
        steps=[(math.inf, theirs, 1e-2), (1.0, ours, 1e-3)],  # llm.c, test_gpt2.c and test_gpt2.cu
    )


def test_gpt2_is_downloaded_once_and_a_failed_download_leaves_nothing(capsys, monkeypatch):
    """The screen tells where from and where to. Later no server is needed."""
    config = gpt.GPTConfig(257, context_length=16, n_embd=8, n_head=2, n_layer=1)
    tokenizer = gpt.load_tokenizer(257, LESSON)
    monkeypatch.setitem(GPT2, "124M", config)
    monkeypatch.setattr(gpt, "load_tokenizer", lambda name: tokenizer)
    file = Path("ours/124M", gpt.GPT2_FILE)
    file.parent.mkdir(parents=True)
    write_gpt2(file, config)
    whole = file.read_bytes()
    ask = "sample --gpt2 124M --device cpu --tokens 3 --ignore-eos --gpt2-url"
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory="ours")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for url in (f"{address}/missing", f"{address}/a b", "nowhere", "http://127.0.0.1:9"):
            assert f"{url}/124M" in refusal(capsys, f"{ask} '{url}'")
        for wrong in (b"page", whole[:-4], whole + bytes(4)):
            file.write_bytes(wrong)
            line = refusal(capsys, f"{ask} {address}")
            assert re.search(f"{address}.* to gpt2.124M", line)
            assert f"{len(wrong):,} bytes, not {len(whole):,}" in line
        assert os.listdir("gpt2/124M") == []
        file.write_bytes(whole)
        first = run(capsys, f"{ask} {address}").out
        server.shutdown()
    monkeypatch.setenv("HOME", os.getcwd())
    for folder in ("gpt2", "~/ours"):
        assert run(capsys, f"{ask} nowhere --gpt2-folder {folder}").out == first


def test_the_recipes_of_the_readme_work(capsys):
    """In the order of their names, the exported matrices are those of OpenAI's file."""
    Path("my.txt").write_text(LESSON + "<|endoftext|>é", encoding="utf-8")
    small = "steps=20, learning_rate=0.03, tokenizer=280, context=16, n_layer=1, n_head=2, n_embd=8"
    names = {}
    for recipe in RECIPES:
        exec(recipe.replace("steps=300", small), names)  # noqa: S102
    printed = capsys.readouterr().out
    assert len(re.findall(r"^0\.\d{3}  (['\"]).+\1$", printed, flags=re.MULTILINE)) == 5
    model = names["model"]
    tokens = names["tokens"]
    total = 0.0
    for place in range(1, len(tokens)):  # the window ends where 8 tokens, half a window, are full
        end = min((place + 7) // 8 * 8, len(tokens) - 1)
        logits = model(tokens[None, max(0, end - 16) : place])[0, -1]
        total -= logits.log_softmax(dim=-1)[tokens[place]].item()
    found = float(re.search("^perplexity (.+)$", printed, flags=re.MULTILINE)[1])
    assert found == pytest.approx(math.exp(total / (len(tokens) - 1)), rel=1e-4)
    exported = torch.load("exported/pytorch_model.bin")
    found = {name: tuple(tensor.shape) for name, tensor in exported.items()}
    expected = {}
    for name, variable in write_gpt2("gpt2.data", model.config).items():  # h0/mlp/c_fc/w, ...
        name = name.replace("h0", "h/0").replace("wte", "wte/w").replace("wpe", "wpe/w")
        name = re.sub("/[wg]$", "/weight", re.sub("/b$", "/bias", name)).replace("/", ".")
        expected[f"transformer.{name}"] = variable.shape
    assert found == expected
    read = tokens[None, :16]
    torch.cat([exported[name].flatten() for name in sorted(exported)]).numpy().tofile("gpt2.data")
    assert_close(gpt.load_gpt2("gpt2.data", model.config)(read), model(read), 1e-5)
    config = json.loads(Path("exported/config.json").read_text())
    expected = {"vocab_size": 280, "n_positions": 16, "n_embd": 8, "n_head": 2, "n_layer": 1}
    assert config["model_type"] == "gpt2" and config.items() >= expected.items()


# ==================================================================================================
# 8 Plumbing
# What every option does. A tiny model in ours/ takes the place of OpenAI's 355M.
ABSENT = "mps" if torch.cuda.is_available() else "cuda"
URL = "http://127.0.0.1:9/x"  # nobody is there
TUNE = f"train {COMMON} --gpt2-folder ours --gpt2"
SHAPE = gpt.GPTConfig(290, context_length=9, n_embd=8, n_head=4, n_layer=3, dropout=0.5)


def config():
    return gpt.load_checkpoint(LAST)[0].config


def gap():
    """How far AdamW's means are from those of the run in base/, as a share of the largest."""
    return (first_means() - first_means("base")).abs().max() / first_means("base").abs().max()


def said(text="The", count=30, temperature=2, top_k=50, seed=1, **settings):
    """What ASK with these settings should print."""
    return continued(text, count, temperature=temperature, top_k=top_k, seed=seed, **settings)


TRAIN_EFFECTS = {  # options: arguments, and what must be true of what is printed and saved
    "prompt": ("--prompt Jack", lambda it: it.out.startswith("Jack")),
    "gpt2 gpt2_folder": (f"{TUNE} 355M", lambda it: config() == GPT2["355M"]),
    "gpt2_url": (f"{TUNE} 774M --gpt2-url {URL}", lambda it: f"{URL}/774M" in it.err),
    "by_hand": ("--by-hand", lambda it: 0 < gap() < 1e-4),
    "seed": ("--seed 0 --learning-rate 0", lambda it: (weights() - weights("base")).norm() > 1),
    "device": (f"--device {ABSENT}", lambda it: f"--device is {ABSENT}" in it.err),
    "dtype": ("--dtype bfloat16", lambda it: 1e-4 < gap() < 0.05),
    "data stride": ("--data other.txt --stride 5", lambda it: "133 windows" in it.err),
    "val_fraction": ("--val-fraction 0", lambda it: not log()[-1]["val_loss"]),
    "size": (f"train {COMMON} --size 355M", lambda it: config() == GPT2["355M"]),
    "tokenizer context n_embd n_head n_layer dropout": (
        "--tokenizer 290 --context 9 --n-embd 8 --n-head 4 --n-layer 3 --dropout 0.5",
        lambda it: config() == SHAPE,
    ),
    "batch_size": ("--batch-size 3", lambda it: gap() > 1e-3),
    "accumulate": ("--accumulate 3", lambda it: gap() > 1e-3),
    "steps learning_rate warmup": (
        "--steps 3 --learning-rate 1 --warmup 2",
        lambda it: column("learning_rate") == pytest.approx([0.5, 1, 0.1]),
    ),
    "weight_decay": ("--weight-decay 900", lambda it: weights()[:999].norm() < 0.5),
    "clip": ("--clip 0.01 --dtype float16", lambda it: 0.0005 < first_means().norm() < 0.002),
    "compile": ("--compile", lambda it: "compiled" in it.out),
    "eval_every": ("--eval-every 1", lambda it: log()[0]["val_loss"]),
    "save_every": ("--save-every 1", lambda it: it.out.count("Hey") == 2),
    "out": ("--out there", lambda it: Path("there/checkpoint.pt").exists()),
}
ASK = "sample --prompt The --temperature 2 --tokens 30"
SAMPLE_EFFECTS = {
    "gpt2 gpt2_folder": ("--gpt2 355M --gpt2-folder ours", lambda it: it.out == said(path="355M")),
    "gpt2_url": (f"--gpt2 774M --gpt2-url {URL}", lambda it: f"{URL}/774M" in it.err),
    "device": (f"--device {ABSENT}", lambda it: f"--device is {ABSENT}" in it.err),
    "dtype": ("--dtype bfloat16 --tokens 300 --ignore-eos", lambda it: it.out != said(count=300)),
    "checkpoint": ("--checkpoint base", lambda it: it.out == said(path="base")),
    "prompt tokens": ("--prompt brown --tokens 7", lambda it: it.out == said("brown", 7)),
    "seed": ("--seed 0", lambda it: it.out == said(seed=0)),
    "temperature": ("--temperature 0", lambda it: it.out == said(temperature=0)),
    "top_k": ("--top-k 0 --ignore-eos", lambda it: it.out == said(top_k=0)),
    "top_p": ("--top-p 0.2 --ignore-eos", lambda it: it.out == said(top_p=0.2)),
    "samples": ("--samples 2", lambda it: it.out.endswith(f"--- sample 2 ---\n{said(seed=2)}")),
    "ignore_eos": ("--ignore-eos --tokens 300", lambda it: it.out == said(count=300)),
}


@pytest.fixture
def stand_ins(monkeypatch):
    """For OpenAI's models and a compiler; and a model whose padding has the largest logits."""
    Path("other.txt").write_text(3 * LESSON)
    tokenizer = gpt.load_tokenizer(280, LESSON)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: tokenizer)
    shape = gpt.GPTConfig(280, context_length=16, n_embd=8, n_head=2, n_layer=2)
    monkeypatch.setitem(GPT2, "355M", shape)
    path = Path("ours/355M", gpt.GPT2_FILE)
    path.parent.mkdir(parents=True)
    write_gpt2(path, shape)
    gpt.save_checkpoint("355M", gpt.load_gpt2(path, shape), tokenizer)
    padded = random_model(vocab_size=304)
    padded.token_embedding.data[280:] = 50 * padded.final_norm.bias
    gpt.save_checkpoint(LAST, padded, tokenizer)

    def compiled(model):
        wrapped = torch.nn.Sequential(model)
        wrapped.register_forward_hook(lambda *_: print("compiled"))
        return wrapped

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setenv("CXX", sys.executable)


@pytest.mark.parametrize(
    ("command", "options", "effects"),
    [(TRAIN, gpt.TrainOptions, TRAIN_EFFECTS), (ASK, gpt.SampleOptions, SAMPLE_EFFECTS)],
    ids=["train", "sample"],
)
@pytest.mark.usefixtures("stand_ins")
def test_every_option_has_its_effect(command, options, effects, capsys, monkeypatch):
    """An option fails if it isn't in the table or the help, is ignored, or does something else."""
    assert set(" ".join(effects).split()) == {item.name for item in fields(options)}
    run(capsys, f"{TRAIN} --out base")
    for arguments, holds in effects.values():
        if effects is TRAIN_EFFECTS:
            shutil.rmtree("out", ignore_errors=True)
        capsys.readouterr()
        with contextlib.suppress(SystemExit):  # some must fail
            gpt.main((arguments if arguments[:5] == "train" else f"{command} {arguments}").split())
        assert holds(capsys.readouterr()), arguments
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit, match="0"):
        gpt.main([command.split()[0], "--help"])
    text = capsys.readouterr().out
    for item in fields(options):
        assert f"  --{item.name.replace('_', '-')}" in text
        assert item.default in (None, False) or f"[{item.default}]" in text


def test_training_and_sampling_work_from_python(monkeypatch):
    """With NumPy's numbers, and with streams that don't know isatty()."""
    written = []
    stream = SimpleNamespace(write=written.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    model = gpt.train(replace(gpt.TrainOptions(**SMALL), steps=np.int64(3)))
    assert torch.equal(parameters(model), weights()) and not model.training and len(log()) == 3
    sampling = gpt.SampleOptions(checkpoint="out", tokens=np.int32(5), temperature=0, prompt="The")
    gpt.sample(sampling)
    printed = "".join(written)
    assert "out, after 3 steps" in printed and continued("The", 5, temperature=0) in printed


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(monkeypatch):
    """Written beside, fsync, then renamed: a power cut can't leave an empty file of that name."""
    calls = []
    monkeypatch.setattr(os, "fsync", lambda number: calls.append(os.fstat(number).st_size))
    monkeypatch.setattr(os, "replace", lambda old, new: calls.append((str(old), str(new))))
    save_reciter("naïve")
    size = os.path.getsize("model.pt.tmp")  # beside it, so on the same disk
    assert calls == [size, ("model.pt.tmp", "model.pt")], "was all of it written before fsync?"
    assert not Path("model.pt").exists(), "only os.replace gives it this name"


@linux_only
@pytest.mark.parametrize("limit", [20_000, 50_000])  # PyTorch fails, or the closing of the file
def test_a_full_disk_ends_the_run_and_nothing_else(limit, capsys):
    """The previous checkpoint is what it was, nothing lies beside it, and the run continues."""
    import resource

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


def test_what_else_users_meet(capsys, monkeypatch):
    """A word helps those without a compiler, with several files, with others' checkpoints."""
    rates = [gpt.TrainOptions(gpt2=size).learning_rate for size in (None, "124M")]
    assert rates == [1.2e-3, 3e-5], "large steps spoil what GPT-2 has learned"
    assert gpt.TrainOptions(gpt2="124M", learning_rate=0.01).learning_rate == 0.01
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        patch.setenv("CXX", "none")
        assert "C++ compiler" in refusal(capsys, f"{TRAIN} --compile --out compiled")
    for command, hint in (("sample --prompt -x", "--prompt=-x"), (f"{TRAIN} more.txt", "cat ")):
        with pytest.raises(SystemExit, match="2"):
            run(capsys, command)
        assert hint in capsys.readouterr().err
    for content in (b"{}" * 99, b"\x98\x01\0\0\0\0\0\0{}"):  # a text; the beginning of safetensors
        Path("foreign").write_bytes(content)
        assert "foreign is missing" in refusal(capsys, "sample --checkpoint foreign")


def test_damage_is_noticed_or_does_no_harm(capsys):
    """A flipped bit: the file is refused, or (in the archive's padding) loads to what was saved. A
    foreign file is refused by its name, and no code in it is run."""

    class Bomb:
        def __reduce__(self):
            return open, ("bang", "w")  # so unpickling it makes a file

    model = gpt.GPT(gpt.GPTConfig(280, context_length=8, n_embd=8, n_head=2, n_layer=1))
    gpt.save_checkpoint("model.pt", model, gpt.load_tokenizer(280, LESSON), {"step": 3})
    data = Path("model.pt").read_bytes()
    other = torch.load("model.pt") | {"format": 2}
    saved = weights("model.pt")
    for place in [*range(0, len(data), 311), *range(len(data) - 64, len(data))]:
        flipped = bytes([data[place] ^ 1 << place % 8])
        Path("model.pt").write_bytes(data[:place] + flipped + data[place + 1 :])
        with contextlib.suppress(gpt.UserError):
            assert torch.equal(weights("model.pt"), saved), place
    for wrong in [[1, 2], model, {"format": Bomb()}, other]:
        torch.save(wrong, "wrong.pt")
        line = refusal(capsys, "sample --checkpoint wrong.pt")
        assert "wrong.pt is missing, damaged" in line and "weights_only" not in line
    assert not Path("bang").exists()


def test_a_folder_that_holds_a_run_is_not_touched(capsys, monkeypatch):
    """Nor one that holds a part of a run. In its name, ~ is the home folder."""
    for name in ("checkpoint.pt", "best.pt", "log.csv"):
        Path(name[:4]).mkdir()
        Path(name[:4], name).write_text("precious")
        line = refusal(capsys, f"{TRAIN} --data missing --out {name[:4]}")
        assert re.search(f"{name[:4]}.*--resume.*--out", line)
        assert Path(name[:4], name).read_text() == "precious"
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)  # as for a folder that is read-only
        assert "--out '.'" in refusal(capsys, f"{TRAIN} --data missing --out .")
    monkeypatch.setenv("HOME", os.getcwd())
    run(capsys, f"{TRAIN} --data ~/lesson.txt --out ~/mine")
    run(capsys, f"{RESUME} --steps 3 --out ~/mine")
    assert len(log("mine")) == 3
    run(capsys, "sample --checkpoint ~/mine --tokens 1")


def test_a_resumed_run_may_change_all_but_the_model(capsys):
    """Its folder and data may have moved, its data changed, and its log.csv been destroyed."""
    run(capsys, f"{TRAIN} --out old")
    before = log("old")
    embedding = gpt.load_checkpoint("old")[0].token_embedding
    os.rename("lesson.txt", "moved.txt")
    os.rename("old", "out")
    assert re.search("--data.*lesson.txt", refusal(capsys, f"{RESUME} --steps 5"))
    fixed = "--size=124M --gpt2=124M --tokenizer=300 --context=8 --n-layer=2 --n-head=1 --n-embd=64"
    for option in fixed.split():
        assert option.partition("=")[0] in refusal(capsys, f"{RESUME} --steps 9 {option}")
    assert re.search("2 steps.*--steps", refusal(capsys, RESUME))
    Path("out/log.csv").write_bytes(b"\xff\0;;")
    changes = "--learning-rate 1e-9 --weight-decay 5e8 --dropout 0.5 --by-hand"
    run(capsys, f"{RESUME} --steps 5 --data moved.txt {changes}")
    assert log()[:2] == before and [row["step"] for row in log()] == list("12345")
    model, _, state = gpt.load_checkpoint(LAST)
    assert model.config.dropout == 0.5 and state["options"]["by_hand"]
    assert model.token_embedding.norm() < 0.3 * embedding.norm(), "the new decay isn't used"
    Path("moved.txt").write_text(2 * LESSON)
    assert "changed" in run(capsys, f"{RESUME} --steps 6 --dtype float16").err
    lowest = training_state()["best_val_loss"]
    assert lowest == pytest.approx(float(log()[-1]["val_loss"])), "other text has other losses"
    os.replace("out/best.pt", LAST)  # a model without the state of a run
    assert "only a model" in refusal(capsys, RESUME)


@pytest.mark.parametrize("modern", [False, True], ids=["T4", "A100"])
def test_the_accelerator_decides_the_dtype(modern, monkeypatch):
    """A process takes the GPU of its number on this machine, and bfloat16 only if it's built in."""
    cuda = torch.device("cuda")
    chosen = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(gpt, "RANK", 9)
    monkeypatch.setattr(gpt, "LOCAL_RANK", 1)
    supported = lambda including_emulation=True: modern or including_emulation
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    half = torch.bfloat16 if modern else torch.float16
    options = gpt.TrainOptions()
    assert gpt.choose_device(options, training=True) == (cuda, half)
    assert gpt.choose_device(options, training=False) == (cuda, torch.float16)
    options = gpt.TrainOptions(device="cpu")
    assert gpt.choose_device(options, training=True) == (torch.device("cpu"), torch.float32)
    options = gpt.TrainOptions(dtype="float32")
    assert gpt.choose_device(options, training=True) == (cuda, torch.float32)
    assert set(chosen) == {1}


def failing(error):
    """A function of any arguments that raises this error."""

    def fail(*given, **named):
        raise error

    return fail


def test_what_ends_a_run_is_one_line_unless_it_is_a_bug(capsys, monkeypatch):
    """A bug keeps its traceback: that's how one edits gpt.py."""
    full = torch.OutOfMemoryError("CUDA out of memory")
    for name, error, command, status, words in (
        ("cross_entropy", KeyboardInterrupt(), TRAIN, 130, "stopped$"),
        ("sample_token", KeyboardInterrupt(), "sample", 130, "stopped$"),
        ("cross_entropy", MemoryError(), RESUME, 2, "out of memory"),
        ("cross_entropy", full, RESUME, 2, "out of memory"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(gpt, name, failing(error))
            assert re.search(words, refusal(capsys, command, status=status))
    assert training_state()["tokens"] > 0, "or --resume can't see that the data has changed"
    with monkeypatch.context() as patch:
        patch.setattr(gpt, "WORLD_SIZE", 2)
        assert "torchrun" in refusal(capsys, f"{TRAIN} --out other")
    monkeypatch.setattr(gpt, "GPT", failing(ValueError("bug")))
    for command in (f"{TRAIN} --out other", "sample"):
        with pytest.raises(ValueError, match="bug"):
            run(capsys, command)


WRONG = {  # options: what they can't be
    "train steps batch-size accumulate stride context n-layer n-head n-embd": "0 1.5",
    "train eval-every save-every clip": "0",
    "train warmup seed learning-rate weight-decay": "-1 inf",
    "train val-fraction dropout": "-0.1 1 nan",
    "train size device dtype gpt2": "huge",
    "sample tokens samples": "0",
    "sample top-k temperature": "-1 nan",
    "sample top-p": "1.1",
}
MISTAKES = {  # the command: what its line has to name, a regular expression
    "": "command",
    "train --step 5": "--step",
    f"{TRAIN} --tokenizer bpe": "--tokenizer.*bpe",
    f"{TRAIN} --data missing.txt": "missing.txt",
    f"{TRAIN} --context 600": r"--data.*\b601\b",
    f"{TRAIN} --data missing --out lesson.txt": "--out.*lesson.txt",
    f"{TRAIN} --data missing --out ''": "--out ''",
    "train --gpt2 124M --n-layer 2": "--gpt2.*--n-layer",
    "train --resume --out nowhere": "nowhere.checkpoint.pt",
    "sample": "out/checkpoint.pt",
    "sample --checkpoint x.pt --gpt2 124M": "--gpt2.*--checkpoint",
}
for words, values in WRONG.items():
    command, *names = words.split()
    for name, value in itertools.product(names, values.split()):
        MISTAKES[f"{command} --{name}={value}"] = rf"--{name}\b.*{re.escape(value)}"


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_was_given(command, capsys):
    """Nothing is written."""
    line = refusal(capsys, command)
    assert re.search(MISTAKES[command], line), line
    assert os.listdir() == ["lesson.txt"]


# ==================================================================================================
# 9 Faster on a CPU
def test_section_9_can_be_deleted(capsys):
    """With its calls: training and sampling stay the same, except for rounding."""
    start = SOURCE.index("# " + "=" * 98 + "\n# 9 Faster on a CPU")
    source = SOURCE[:start] + SOURCE[SOURCE.index('if __name__ == "__main__"') :]
    source, calls = re.subn(r"\n +speed_up_\w+\(.*", "", source)
    assert calls == 2 and "speed_up_" not in source
    Path("plain.py").write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("plain", "plain.py")
    plain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain)
    said = []
    for module, out in ((gpt, "fast"), (plain, "plain")):
        module.main(f"{TRAIN} --steps 20 --learning-rate 0.01 --out {out}".split())
        module.main(f"sample --checkpoint {out} --temperature 0".split())
        said.append(capsys.readouterr().out)
    assert column("train_loss", "fast") == pytest.approx(column("train_loss", "plain"), abs=1e-4)
    assert said[0] == said[1]


@pytest.mark.parametrize("threads", [1, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_model_that_was_made_faster_gives_the_same_logits(dtype, threads, monkeypatch):
    """For many tokens or one, one text or several, matrices by rows or (OpenAI's) by columns."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for rows, by_columns in itertools.product((1, 3), (False, True)):
        model = random_model()
        tokens = random_tokens(rows, 12)
        expected = model(tokens)
        for parameter in model.blocks.parameters():
            if by_columns and parameter.dim() == 2:
                parameter.data = parameter.data.t().contiguous().t()
        model.to(dtype)
        gpt.speed_up_decoding(model)
        cache = gpt.KVCache(model.config)
        logits = [model(piece, cache) for piece in tokens.split([5, 1, 1, 1, 1, 1, 1, 1], dim=1)]
        assert_close(torch.cat(logits, dim=1), expected, tolerance=20 * torch.finfo(dtype).eps)


def test_a_cpu_that_would_round_keeps_its_setting(monkeypatch):
    products = torch.backends.mkldnn.matmul
    products.fp32_precision = "ieee"
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    gpt.speed_up_training()
    assert products.fp32_precision == "ieee"
