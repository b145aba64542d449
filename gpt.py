"""GPT-2 in one file, to be read from the top: 1 config, 2 layers, 3 model, 4 dataset, 5 training,
6 decoding, 7 OpenAI's weights, 8 command line; and to be run:
    python gpt.py train                              a GPT learns a short story, on a laptop
    python gpt.py sample --prompt "I HAD always"     it goes on with a text
    python gpt.py sample --gpt2 124M                 so does OpenAI's GPT-2 (a 500 MB download)
    python gpt.py train --gpt2 124M --data my.txt    GPT-2 goes on learning, from your text
A GPT reads a sequence of tokens (words, parts of words, bytes) and gives, for each place, every
token's probability to come next. Training moves its parameters until those that do come are
probable; sampling draws one, appends it and asks again. "GPT-2" is Radford et al. 2019, "Language
Models are Unsupervised Multitask Learners"; src/... are files of github.com/openai/gpt-2. Shapes: B
batch, sequences side by side; T tokens of each in one call; S = T + those in a cache; C channels,
the n_embd numbers that stand for a token, its row; H heads of D = C / H channels; V vocabulary."""

import argparse, codecs, collections, contextlib, ctypes, functools, gc, itertools  # noqa: I001
import json, math, os, re, signal, sys, time, urllib.request, zipfile
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset


# ==================================================================================================
# 1 Config
# Seven fields fix the architecture, and all but n_head and dropout the parameters' shapes. `fused`
# does neither: LayerNorm, GELU and attention stand here twice, spelt out and as one fast kernel.
def require(ok, message):
    """Raise ValueError unless ok: for what a user can mend."""
    if not ok:
        raise ValueError(message)


def progress(text, keep=True):
    """Show a line on standard error; one that isn't kept is overwritten, or left out of a file."""
    width = os.get_terminal_size(2).columns - 1 if sys.stderr.isatty() else 0
    text = text if keep else text[:width]  # what is to be overwritten must fit one line
    if keep or width:
        print(text.ljust(width), end="\n" if keep else "\r", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. Raises ValueError for an impossible one. Source: GPT-2, section 2.3."""

    vocab_size: int = 50257  # V: 256 bytes, 50,000 learned tokens, <|endoftext|>
    context_length: int = 1024  # the most tokens read at once
    n_embd: int = 768  # C
    n_head: int = 12  # H; in all of OpenAI's sizes D is 64
    n_layer: int = 12  # blocks, one after the other
    dropout: float = 0.0  # share of activations zeroed while training; OpenAI used 0.1
    qkv_bias: bool = True  # whether query, key and value have a bias; GPT-2's have
    fused: bool = True  # PyTorch's kernels, or the hand-written lines

    def __post_init__(self):
        require(min(astuple(self)[:5]) >= 1, f"each of the five sizes must be 1 or more: {self}")
        require(self.n_embd % self.n_head == 0, f"n_head must divide n_embd: {self}")
        require(0 <= self.dropout < 1, f"dropout {self.dropout} must be at least 0 and below 1")


SHAPES = (("124M", 768, 12), ("355M", 1024, 24), ("774M", 1280, 36), ("1558M", 1600, 48))
GPT2_CONFIGS = {size: GPTConfig(n_embd=C, n_head=C // 64, n_layer=n) for size, C, n in SHAPES}
SIZES = {"small": GPTConfig(context_length=64, n_embd=384, n_head=6, n_layer=4), **GPT2_CONFIGS}


class Options(argparse.Namespace):
    """The options of train (t), of sample (s), and those a resumed run may change (r): name,
    default (- is None), values (a|b, 1.. whole, 0.0..1 any) and what it does [what None means].
    t    data           -      text        UTF-8, or .bin: GPT-2's tokens, uint16 [the-verdict.txt]
    t    val_fraction   0.1    0.0..0.99   the end of the data, kept for validation
    t    tokenizer      -      text        gpt2, or N: learn N tokens from data [gpt2, else 1024]
    t    size           small  small|124M|355M|774M|1558M  the shape of a new model
    ts   gpt2           -      124M|355M|774M|1558M  use OpenAI's weights
    ts   gpt2_folder    gpt2   text        where its files are kept, in a folder for each size
    ts   gpt2_url       https://openaipublic.blob.core.windows.net/gpt-2/models  text  the source
    s    checkpoint     out/checkpoint.pt  text  a model that was trained here
    t    context        -      1..1000000  tokens in a window [the size's]
    t    n_layer        -      1..1000     blocks [the size's]
    t    n_head         -      1..1000     attention heads [the size's]
    t    n_embd         -      1..1000000  channels [the size's]
    t    dropout        0      0.0..0.99   share of activations zeroed while training
    t    from_scratch   -      switch      run the hand-written arithmetic, not PyTorch's kernels
    tr   steps          280    1..         optimizer steps, in all
    tr   batch_size     8      1..10000    windows that each process reads at once
    tr   accumulate     1      1..         batches whose gradients add up to one step
    t    stride         -      1..         tokens from window to window [half the context]
    t    learning_rate  1e-3   0.0..1e9    the highest, at the end of the warm-up
    t    warmup         20     0..         steps in which the learning rate rises
    t    weight_decay   0.1    0.0..10     pull of matrices and embeddings towards 0
    t    clip           1      1e-9..1e9   a gradient of a greater norm is shortened to it
    tr   eval_every     20     1..         steps between measurements of the validation loss
    tr   save_every     100    1..         steps between checkpoints
    tr   sample_every   100    1..         steps between samples of text
    ts   prompt         I HAD always thought  text  to be continued; sample reads - from its input
    s    tokens         100    1..         the most tokens to add
    s    temperature    0.8    0.0..1e6    0 takes the most probable token, more varies more
    s    top_k          50     1..         draw among the k most probable tokens
    s    top_p          1      1e-9..1     draw among the fewest that have probability p in sum
    s    samples        1      1..1000     how many continuations
    s    ignore_eos     -      switch      go on after <|endoftext|>
    s    no_cache       -      switch      read the whole text again for each token (to compare)
    ts   seed           1      0..1e18     another number, other weights, order and draws
    tsr  device         auto   auto|cpu|cuda|mps  where to compute
    tsr  dtype          auto   auto|float32|bfloat16|float16  to compute in [16 bits with cuda]
    tsr  compile        -      switch      let torch.compile fuse the arithmetic; starts slowly
    tr   out            out    text        folder for checkpoint.pt, best.pt and log.csv
    tr   resume         -      switch      go on from the checkpoint in that folder"""

    def __init__(self, command, **given):
        for name, default, values, _, _ in self.table(command):
            value = given.get(name, default)
            if ".." in values and value is not None:
                low, high = values.split("..")
                inside = float(low) <= value <= float(high or math.inf)  # which NaN never is
                require(inside, f"--{name.replace('_', '-')} is {value}, it must be in {values}")
            setattr(self, name, value)

    @classmethod
    def table(cls, command):
        """Each option's name, default, values, their type (str, int, float), and explanation."""
        for line in cls.__doc__.splitlines()[2:]:
            commands, name, default, values, text = re.split(r"  +", line.strip(), maxsplit=4)
            kind = str if ".." not in values else int if re.match(r"\d+\.\.", values) else float
            if command[0] in commands:
                yield name, None if default == "-" else kind(default), values, kind, text


# ==================================================================================================
# 2 Layers
# A token travels as a row of C numbers, its residual stream. A block adds to it twice: attention
# moves information from row to row, the feed-forward network works on each row. x (B, T, C) are all
# rows. nn.Linear(m, n) holds W (n, m) and b (n,), and maps x (..., m) to x Wᵀ + b (..., n).
class LayerNorm(nn.Module):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias over the C of each row of (B, T, C): so
    layers read numbers of one size. Source: Ba et al. 2016, section 3.1; src/model.py, norm()."""

    def __init__(self, config):
        super().__init__()
        self.fused, self.eps = config.fused, 1e-5  # eps keeps a constant row from dividing by 0
        self.weight = nn.Parameter(torch.ones(config.n_embd))  # the gain
        self.bias = nn.Parameter(torch.zeros(config.n_embd))

    def forward(self, x):
        if self.fused:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        x = x - x.mean(-1, keepdim=True)  # (B, T, C) - (B, T, 1)
        variance = x.square().mean(-1, keepdim=True)  # (B, T, 1), divided by C, not C - 1
        return x * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class GELU(nn.Module):
    """x times the probability that a standard normal number is below x: a soft max(0, x). The tanh
    form was faster than the exact one; GPT-2 was trained with it. Hendrycks and Gimpel 2016, 2."""

    def __init__(self, config):
        super().__init__()
        self.fused = config.fused

    def forward(self, x):
        if self.fused:
            return F.gelu(x, approximate="tanh")
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


class CausalSelfAttention(nn.Module):
    """Each token mixes together what it finds in itself and the tokens before it.
        attention(Q, K, V) = softmax(Q Kᵀ / sqrt(D) + mask) V                 in each of H heads
    A row's query says what it looks for, its key what it offers, its value what it hands over. A
    score sums D products of either sign, so it grows like sqrt(D); undivided, one weight would be
    near 1, the others near 0, and no gradient come back. The mask makes scores of later tokens -∞
    before the softmax: so the weights left sum to 1, which they would not if zeroed after it.
                        key:   I   HAD  always     (B, T, C) -> (B, T, C)
        query  I              1.0   0     0        Row t knows tokens up to t only: one pass over a
               HAD            0.7  0.3    0        text predicts at all T places, and none of them
               always         0.3  0.1   0.6       looks at its answer. Vaswani et al. 2017, 3.2"""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout, self.fused = config.n_head, config.dropout, config.fused
        C, bias = config.n_embd, config.qkv_bias
        self.query, self.key, self.value = (nn.Linear(C, C, bias=bias) for _ in range(3))
        self.projection = nn.Linear(C, C)  # mixes what the heads found

    def forward(self, x, past=None, start=0):
        """past: this layer's buffers (B, H, ., D) of a KVCache (section 3), with `start` tokens."""
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)  # the channels shared out: C = H * D
        q, k, v = (f(x).view(heads).transpose(1, 2) for f in (self.query, self.key, self.value))
        if past is not None:
            for buffer, new in zip(past, (k, v), strict=True):
                buffer[:, :, start : start + T] = new
            k, v = (buffer[:, :, : start + T] for buffer in past)  # (B, H, T, D) -> (B, H, S, D)
        mask, dropout = None, self.dropout if self.training else 0.0
        if T > 1 and (start > 0 or not self.fused):  # query i, token start + i, sees keys up to it
            mask = torch.ones(T, start + T, dtype=torch.bool, device=x.device).tril(start)  # (T, S)
        if self.fused and (T > 1 or not x.is_cpu):
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, T > 1 and mask is None)
        elif T == 1:  # a CPU takes sums of products faster than products with a matrix of one row
            weights = torch.softmax((q * k).sum(-1, keepdim=True) / math.sqrt(q.shape[-1]), dim=-2)
            y = (F.dropout(weights, dropout) * v).sum(-2, keepdim=True)  # (B, H, 1, D)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
            scores = scores.masked_fill(~mask, -math.inf)  # exp(-∞) = 0
            weights = F.dropout(torch.softmax(scores, dim=-1), dropout)  # exp(score) / row's sum
            y = weights @ v  # (B, H, T, S) @ (B, H, S, D) -> (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return F.dropout(self.projection(y), dropout)


class FeedForward(nn.Module):
    """gelu(x W₁ᵀ + b₁) W₂ᵀ + b₂: (B, T, C) -> (B, T, 4C) -> (B, T, C). src/model.py, mlp()."""

    def __init__(self, config):
        super().__init__()
        self.expand = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu, self.dropout = GELU(config), config.dropout
        self.projection = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return F.dropout(self.projection(self.gelu(self.expand(x))), self.dropout, self.training)


class TransformerBlock(nn.Module):
    """Both layers read the stream through a norm and add to it (pre-LayerNorm). Norms on the stream
    itself would rescale each gradient; a plain sum takes it whole to every layer. GPT-2, 2.3."""

    def __init__(self, config):
        super().__init__()
        self.norm_1, self.attention = LayerNorm(config), CausalSelfAttention(config)
        self.norm_2, self.feed_forward = LayerNorm(config), FeedForward(config)

    def forward(self, x, past=None, start=0):
        x = x + self.attention(self.norm_1(x), past, start)  # (B, T, C)
        return x + self.feed_forward(self.norm_2(x))  # (B, T, C)


# ==================================================================================================
# 3 Model
#     x = token_embedding[tokens] + position_embedding[0, 1, ..., T - 1]
#     x = block(x), n_layer times
#     logits = final_norm(x) token_embeddingᵀ
# Attention by itself is blind to order, so each place in the window has a learned vector as well.
# The output head's V scores (logits) are a row's products with the token embeddings ("tied"): what
# is alike to read is alike to predict. This saves V * C parameters, 38.6 of 163 million in 124M.
# Thanks to the mask, keys and values never depend on later tokens. When a text grows they stay what
# they were: computed once, they are kept, and only new tokens' rows go through the blocks.
#     held: [ I | HAD |        |     ], length 2; "always" is read: [ I | HAD | always |     ], 3
# The price, per sequence: 2 * n_layer * C numbers a token; 124M, float32: 72 KiB, a window 72 MiB.
class KVCache:
    """The keys and values of the tokens read so far, in buffers made once, for `length` tokens."""

    def __init__(self, config, batch_size, length=None, device=None, dtype=None):
        length, D = length or config.context_length, config.n_embd // config.n_head
        new = functools.partial(torch.empty, (batch_size, config.n_head, length, D), dtype=dtype)
        self.layers = [[new(device=device), new(device=device)] for _ in range(config.n_layer)]
        self.length = 0  # tokens held


class GPT(nn.Module):
    """tokens (B, T) -> logits (B, T, V): log-probabilities of the next token, up to a constant."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        V, T, C = config.vocab_size, config.context_length, config.n_embd
        self.token_embedding = nn.Embedding.from_pretrained(torch.empty(V, C), freeze=False)
        self.position_embedding = nn.Embedding.from_pretrained(torch.empty(T, C), freeze=False)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        self.final_norm = LayerNorm(config)
        if self.token_embedding.weight.is_meta:  # shapes without memory, for weights from a file
            return
        for name, parameter in self.named_parameters():  # GPT-2, section 2.3; src/model.py
            if parameter.dim() > 1:
                # 2 n_layer terms add up in the stream, and their variances: / sqrt keeps its size.
                terms = 2 * config.n_layer if name.endswith("projection.weight") else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(terms))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens, cache=None, last=False):
        """The tokens follow those in the cache; with `last`, logits (B, 1, V) of the last place."""
        start, context = cache.length if cache else 0, self.config.context_length
        end = start + tokens.shape[1]
        require(end <= context, f"{end} tokens are more than the model's window of {context}")
        x = self.token_embedding(tokens)  # (B, T) -> (B, T, C)
        x = x + self.position_embedding.weight[start:end]  # (T, C), for every sequence
        x = F.dropout(x, self.config.dropout, self.training)
        for n, block in enumerate(self.blocks):
            x = block(x, cache.layers[n] if cache else None, start)
        if cache:
            cache.length = end
        x = self.final_norm(x[:, -1:] if last else x)
        return F.linear(x, self.token_embedding.weight)  # (B, T, C) @ (C, V) -> (B, T, V)


def cross_entropy(logits, targets):
    """Mean of -log softmax(logits)[target] in nats: logits (..., V), targets (...) int64. Small new
    weights give each token about 1/V: the loss starts near ln V, 10.8 with GPT-2's vocabulary."""
    logits = logits if logits.dtype == torch.float64 else logits.float()  # sums need 32 bits
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (B, T, V) -> (B, T)
    return (logits.logsumexp(-1) - chosen).mean()  # log(sum of exp), the largest taken out first


# ==================================================================================================
# 4 Dataset
# GPT-2's tokenizer starts from the 256 bytes, so that it can write anything, and has learned 50,000
# longer tokens by merging the most frequent pair of neighbours again and again (byte-pair encoding;
# Sennrich et al. 2016, GPT-2 2.2), never across words (with the space before). tiktoken applies it.
EOT = "<|endoftext|>"  # one token, between two documents; merging never makes it
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def make_tokenizer(name, ranks, eot):
    """A tiktoken.Encoding from ranks, {bytes of a token: its number}; lower ones merge first."""
    return tiktoken.Encoding(name, pat_str=WORDS, mergeable_ranks=ranks, special_tokens={EOT: eot})


def read_gpt2_tokenizer(folder):
    """GPT-2's own. encoder.json writes each byte as a printable character; see src/encoder.py."""
    ranks = json.loads((folder / "encoder.json").read_text("utf-8"))
    merges = (folder / "vocab.bpe").read_text("utf-8").split("\n")[1:-1]  # after a version
    fit = all(ranks.get(merge.replace(" ", "")) == 256 + n for n, merge in enumerate(merges))
    require(fit, f"vocab.bpe and encoder.json in {folder} don't fit each other; delete the folder")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the rest: chr(256), ...
    byte = {chr(b): b for b in printable}
    byte |= {chr(256 + n): b for n, b in enumerate(sorted({*range(256)} - {*printable}))}
    end_of_text = ranks.pop(EOT)
    ranks = {bytes(byte[c] for c in token): rank for token, rank in ranks.items()}
    return make_tokenizer("gpt2", ranks, end_of_text)


def load_tokenizer(name=None, folder="gpt2", text=None):
    """Name "gpt2": GPT-2's tokenizer, from a folder/SIZE or by tiktoken, else OSError. A number N:
    one of N tokens, learned from the text. None: the first of these that can be had."""
    if name in (None, "gpt2"):
        for vocabulary in sorted(Path(folder).glob("*/vocab.bpe")):
            return read_gpt2_tokenizer(vocabulary.parent)
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # the network's, in whatever form tiktoken passes it on
            problem = f"can't download GPT-2's vocabulary ({type(error).__name__})"
            if name == "gpt2" or text is None:
                raise OSError(f"{problem}; go online, or take a text, --tokenizer 1024") from error
            progress(f"{problem}; learning 1024 tokens from the text instead")
    size = "1024" if name is None else str(name)
    require(size.isdecimal(), f"--tokenizer is {name}, it must be gpt2 or a number from 257 up")
    require(text is not None, "a .bin file holds GPT-2's tokens, --tokenizer can only be gpt2")
    ranks = train_bpe(text, int(size) - 1)  # and then <|endoftext|>
    return make_tokenizer("learned", ranks, len(ranks))


def train_bpe(text, vocab_size):
    """Learn {bytes: rank}: the 256 bytes, then again and again the most frequent pair of neighbours
    until there are vocab_size (ValueError below 256). Source: Sennrich et al. 2016, algorithm 1."""
    require(vocab_size >= 256, f"a vocabulary of {vocab_size} tokens can't hold the 256 bytes")
    tokens = [bytes([b]) for b in range(256)]
    # WORDS for the standard library, which has no \p: a letter is a \w that is no digit and no _.
    runs = re.findall(r"'(?:[stmd]|re|ve|ll)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s", text)
    counts = collections.Counter(word.encode().decode("latin-1") for word in runs)  # byte n: chr(n)
    while len(tokens) < vocab_size:
        pairs = collections.Counter()  # recounted for each merge
        for word, count in counts.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        left, right = max(pairs, key=pairs.get)  # of equals the first met
        counts = {word.replace(left + right, chr(len(tokens))): n for word, n in counts.items()}
        tokens.append(tokens[ord(left)] + tokens[ord(right)])
    return {token: rank for rank, token in enumerate(tokens)}


# The target is the input shifted by one: every place has the token that follows as its answer. With
# a stride below the context a token is trained at several positions, else always at the same one.
#     tokens      I  HAD  always  thought  Jack  Gis  burn       context 4, stride 2
#     window 1            always  thought  Jack  Gis             its target: thought Jack Gis burn
class SlidingWindows(Dataset):
    """Item i is (input, target), int64 (context_length,) each, read from token i * stride on."""

    def __init__(self, tokens, context_length, stride, vocab_size=math.inf):
        self.tokens, self.context_length = tokens, context_length
        self.stride, self.vocab_size = stride, vocab_size

    def __len__(self):
        return max(0, (len(self.tokens) - self.context_length - 1) // self.stride + 1)

    def __getitem__(self, i):
        at = range(len(self))[i] * self.stride  # IndexError after the last
        window = np.asarray(self.tokens[at : at + self.context_length + 1]).astype(np.int64)
        known = window.max() < self.vocab_size  # else the embedding would fail, or worse
        require(known, f"token {window.max()} in the data, the vocabulary has {self.vocab_size}")
        return torch.from_numpy(window[:-1]), torch.from_numpy(window[1:])


def read_data(options, tokenizer, config):
    """The windows to train on, and batches of windows, from the end of the data, to validate."""
    path, most, V = options.data, config.context_length, config.vocab_size
    if path.endswith(".bin"):
        size = os.path.getsize(path)
        require(size and size % 2 == 0, f"{path} has {size} bytes, tokens have two each")
        tokens = np.memmap(path, dtype="<u2", mode="r")
    else:
        tokens = tokenizer.encode_to_numpy(Path(path).read_text("utf-8"), allowed_special="all")
    context, held_out = options.context or most, int(len(tokens) * options.val_fraction)
    cut = len(tokens) - held_out  # what comes after it is for validation
    require(context <= most, f"--context {context} is more than the model's window of {most}")
    windows = SlidingWindows(tokens[:cut], context, options.stride or max(1, context // 2), V)
    require(len(windows) > 0, f"{path}: {cut} tokens to train on, {context + 1} are needed")
    short = max(1, min(context, held_out - 1))  # a short part, a shorter window; 64 of them will do
    validation = SlidingWindows(tokens[cut:], short, max(short, held_out // 64), V)
    return windows, DataLoader(validation, options.batch_size)


# ==================================================================================================
# 5 Training
# One step: read a batch of windows, measure the loss, let autograd find how it changes with each
# parameter (the gradient), and move every parameter a little against it. AdamW (Loshchilov and
# Hutter 2019) divides the mean of a parameter's last gradients by their root mean square: all move
# by about the learning rate. The rate rises at first (warm-up), while those means rest on too few
# gradients to be trusted, then falls along half a cosine: large steps to get near, small to settle.
# Everything random is a function of (seed, step) or (seed, epoch), so that none of it needs saving.
# Time a token: a multiply-add is 2 operations, backward 4 (for both factors): 6N for N weights, in
# attention 12 n_layer C T: 0.775 GFLOP in 124M, T = 256. 365 tokens/s are 283 GFLOP/s, 70% of what
# our two cores can. Memory: 16 bytes a parameter (it, its gradient, AdamW's two means), here 2 GB;
# then what backward needs of each layer: logits alone are 4 B T V bytes, 0.4 GB with B 8, T 256.
# bfloat16 rounds what products read, for speed; weights, gradients, AdamW's means and loss stay
# float32. Accumulation reads a batch in parts, if memory is short: their gradients, each divided
# by the number of parts, add up. Processes hold a model each, alike, as all take the mean gradient.
def save_checkpoint(path, model, tokenizer, training_state=None):
    """Write all that is needed to go on; a kill leaves the previous file or this one."""
    content = {"format": 1, "config": asdict(model.config), "weights": model.state_dict()}
    ranks = tokenizer._mergeable_ranks
    tokens = " ".join(token.hex() for token in sorted(ranks, key=ranks.get))  # loads fast as text
    content["tokenizer"] = (tokenizer.name, tokens, tokenizer.eot_token)
    try:
        with open(f"{path}.tmp", "wb") as file:
            torch.save(content | {"training_state": training_state}, file)
            file.flush()  # Python's buffer
            os.fsync(file.fileno())  # first on the disk, then under its name
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        Path(f"{path}.tmp").unlink(missing_ok=True)
        raise OSError(f"can't write {path} ({error}); what was there before still is") from error


def load_checkpoint(path, **changes):
    """(model, tokenizer, training_state or None), checked, then mapped; `changes` to the config."""
    require(os.path.isfile(path), f"there is no file {path}; train first, or name another")
    try:
        with zipfile.ZipFile(path) as archive:  # it has checksums, which torch.load doesn't look at
            require(archive.testzip() is None, "a checksum differs")
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        require(content["format"] == 1, f"its format is {content['format']}, not 1")
        with torch.device("meta"):  # shapes without memory: the file's tensors take their places
            model = GPT(GPTConfig(**content["config"] | changes)).eval()
        model.load_state_dict(content["weights"], assign=True)
        name, tokens, end_of_text = content["tokenizer"]
        ranks = {bytes.fromhex(token): rank for rank, token in enumerate(tokens.split())}
        return model, make_tokenizer(name, ranks, end_of_text), content["training_state"]
    except Exception as error:
        raise ValueError(f"{path} is damaged or not a checkpoint of gpt.py ({error})") from error


def learning_rate(step, options):
    """The learning rate of step 0, 1, ..., steps - 1: up to the highest, down to a tenth."""
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    done = (step + 1 - options.warmup) / (options.steps - options.warmup)  # 1 in the last step
    return options.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


def make_optimizer(model, decay):
    """AdamW, betas of GPT-3. Decay keeps matrices and embeddings small; gains belong near 1."""
    vectors = {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}
    matrices = {"params": [p for p in model.parameters() if p.dim() > 1]}
    return torch.optim.AdamW([matrices, vectors], weight_decay=decay, betas=(0.9, 0.95), fused=True)


def shuffled(n, seed, first, block=1 << 20):
    """Window numbers without end, from `first` on; each epoch (pass) shuffles each block anew."""
    for i in itertools.count(first):
        epoch, place = divmod(i, n)
        begin, at = place // block * block, place % block
        if i == first or at == 0:
            generator = torch.Generator().manual_seed(hash((seed, epoch, begin)))
            order = torch.randperm(min(block, n - begin), generator=generator)
        yield begin + int(order[at])


@torch.no_grad()
def evaluate(model, batches, device):
    """Mean loss over the windows in these batches."""
    model.eval()
    losses = [(cross_entropy(model(x.to(device)), y.to(device)).item(), len(x)) for x, y in batches]
    model.train()
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)


def summarise(out):
    """Show the course of a run as sparklines, where its results are, what to try with them."""
    log = np.genfromtxt(out / "log.csv", delimiter=",", skip_header=1, ndmin=2)
    for name, column in (("training", log[:, 1]), ("validation", log[:, 2])):
        if len(losses := column[~np.isnan(column)]):
            points = [part.mean() for part in np.array_split(losses, min(40, len(losses)))]
            heights = 7.99 * (points - min(points)) / (np.ptp(points) or 1)
            line = "".join("▁▂▃▄▅▆▇█"[int(height)] for height in heights)
            progress(f"{name:>10} {losses[0]:6.3f} {line} {losses[-1]:.3f}, best {min(losses):.3f}")
    progress(f"Where validation rises, text is memorised: {out}/best.pt, if any, is from before.")
    progress(f"Try: python gpt.py sample --checkpoint {out}/checkpoint.pt --temperature 0")


def prepare(name, dtype):
    """The torch.device and torch.dtype of these names. On a CPU, two settings halve a step's time:
    glibc keeps freed buffers, oneDNN multiplies float32 (it does only if bfloat16 is allowed)."""
    here = ["cpu"] + ["mps"] * torch.backends.mps.is_available()
    here += ["cuda"] * torch.cuda.is_available()
    require(name in ("auto", *here), f"--device {name} is not there, only {', '.join(here)}")
    device = torch.device(here[-1] if name == "auto" else name)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # each process its own
        if dtype == "auto":  # GPUs from before 2020 have float16 only
            dtype = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    if device.type == "cpu":
        with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
            for pair in ((-3, 1 << 25), (-3, 1 << 30), (-1, (1 << 31) - 1)):
                ctypes.CDLL(None).mallopt(*pair)  # M_MMAP_ (or 32 MB, if older), M_TRIM_THRESHOLD
        products, x = torch.backends.mkldnn.matmul, torch.rand(512, 512)
        before, products.fp32_precision = products.fp32_precision, "bf16"  # oneDNN, not MKL
        if not torch.equal(x @ torch.eye(512), x):
            products.fp32_precision = before  # a processor with AMX would really round
    return device, getattr(torch, "float32" if dtype == "auto" else dtype)


def start(given, world):
    """A run, new or resumed -> (options, model, tokenizer, state)."""
    options, state = Options("train", **given), {"step": 0, "best_val_loss": math.inf}
    state["log"] = "step,train_loss,val_loss,learning_rate,tokens_per_second\n"
    options.data = os.path.abspath(options.data or Path(__file__).with_name("the-verdict.txt"))
    if options.resume:
        model, tokenizer, state = load_checkpoint(Path(options.out, "checkpoint.pt"))
        require(state, f"{options.out}/checkpoint.pt has weights alone, nothing to resume")
        fixed = ", ".join(given.keys() - {name for name, *_ in Options.table("resume")})
        require(not fixed, f"a resumed run keeps its {fixed}; leave that out, or start anew")
        options = Options("train", **state["options"] | given | {"out": options.out})
        done, batch = state["step"], state["batch"]
        if "accumulate" not in given:  # follows from the number of processes
            options.accumulate = max(1, batch // (options.batch_size * world))
        now = options.batch_size * options.accumulate * world
        require(now == batch, f"batch size x accumulate x processes is {now}, it must stay {batch}")
        require(options.steps >= done, f"--steps is {options.steps}, but {done} are done already")
        return options, model, tokenizer, state
    changes = {"dropout": options.dropout, "fused": not options.from_scratch}
    shape = {name: given[name] for name in ("n_layer", "n_head", "n_embd") if name in given}
    if options.gpt2:
        clash = ", ".join(given.keys() & {"size", "tokenizer", *shape})
        require(not clash, f"--gpt2 brings its own {clash}; leave out one of the two")
        folder = Path(options.gpt2_folder, options.gpt2)
        require(world == 1 or (folder / "model.pt").exists(), "first run sample --gpt2 by itself")
        download_gpt2(options.gpt2, folder, options.gpt2_url)  # section 7
        model, tokenizer = load_gpt2(folder, **changes)
        for weight in model.parameters():
            weight.data = weight.data.contiguous()  # row by row: an eighth faster to train
        return options, model, tokenizer, state
    text = None if options.data.endswith(".bin") else Path(options.data).read_text("utf-8")
    tokenizer = load_tokenizer(options.tokenizer, options.gpt2_folder, text)
    config = replace(SIZES[options.size], vocab_size=tokenizer.n_vocab, **shape, **changes)
    config = replace(config, context_length=options.context or config.context_length)
    torch.manual_seed(options.seed)  # for the initial parameters
    return options, GPT(config), tokenizer, state


def train(**given):
    """Train a new GPT, or OpenAI's further; -> the model, ValueError or OSError for a mistake."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    options, model, tokenizer, state = start(given, world)
    out, (device, dtype) = Path(options.out), prepare(options.device, options.dtype)
    windows, val_batches = read_data(options, tokenizer, model.config)
    if world > 1:  # one process of several, which torchrun has started and numbered
        torch.distributed.init_process_group()  # nccl between GPUs, gloo between CPUs
    optimizer = make_optimizer(model.to(device).train(), options.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # gradients * 2^n
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if options.resume:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"] or scaler.state_dict())
    parallel = torch.compile(model) if options.compile else model  # spelt out as fast as fused
    parallel = nn.parallel.DistributedDataParallel(parallel) if world > 1 else parallel
    first, batch = state["step"], options.batch_size * options.accumulate * world  # windows a step
    order = itertools.islice(shuffled(len(windows), options.seed, first * batch), rank, None, world)
    pinned = device.type == "cuda"  # from pinned memory: no wait until a batch has gone over
    batches = iter(DataLoader(windows, options.batch_size, sampler=order, pin_memory=pinned))
    if rank == 0:
        if not options.resume and any((out / f"{n}.pt").exists() for n in ("checkpoint", "best")):
            free = (p for n in itertools.count(1) if not (p := Path(f"{out}.{n}")).exists())
            progress(f"{out} held an earlier run, which is now in {out.rename(next(free))}")
        out.mkdir(parents=True, exist_ok=True)
        log = open(out / "log.csv", "w", buffering=1)  # noqa: SIM115  buffered by lines
        log.write(state["log"])  # what a killed run wrote after its checkpoint is written again
        size = sum(parameter.numel() for parameter in model.parameters())
        progress(f"{size:,} parameters learn from {len(windows):,} windows, on {device} in {dtype}")
    begun, signals, stop, rows = time.perf_counter(), [], 0, [state["log"]]
    with contextlib.ExitStack() as afterwards:
        for s in (signal.SIGINT, signal.SIGTERM):  # noted, and obeyed when the step is done
            afterwards.callback(signal.signal, s, signal.signal(s, lambda n, _: signals.append(n)))
        for done in range(first + 1, options.steps + 1):
            started, last = time.perf_counter(), done == options.steps
            torch.manual_seed(hash((options.seed, done, rank)))  # dropout draws from this
            loss = torch.zeros((), device=device)
            for micro in range(1, options.accumulate + 1):  # gradients add up
                inputs, targets = (t.to(device, non_blocking=True) for t in next(batches))
                parallel.require_backward_grad_sync = micro == options.accumulate  # then averaged
                with autocast:
                    part = cross_entropy(parallel(inputs), targets) / options.accumulate
                scaler.scale(part).backward()
                loss += part.detach()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            shared = torch.stack((loss / world, norm / world, loss.new_tensor(len(signals))))
            if world > 1:  # all processes have to agree on the loss, and whether to stop
                torch.distributed.all_reduce(shared)
            loss, norm, stop = shared.tolist()
            finite = math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled())
            require(finite, f"step {done}: loss {loss}, gradient {norm}; lower --learning-rate")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done - 1, options)
            scaler.step(optimizer)  # not, if it finds a gradient that isn't finite
            scaler.update()  # a smaller factor after an overflow, in time a larger one
            optimizer.zero_grad()  # sets them to None: the next backward pass makes them anew
            speed = batch * windows.context_length / (time.perf_counter() - started)
            if rank == 0:
                line, measured = f"step {done}/{options.steps}  loss {loss:.3f}", ""
                if len(val_batches) and (last or done % options.eval_every == 0):
                    val_loss = autocast(evaluate)(model, val_batches, device)
                    line, measured = f"{line}  val {val_loss:.3f}", f"{val_loss:.9g}"
                    if val_loss < state["best_val_loss"]:
                        state["best_val_loss"] = val_loss
                        save_checkpoint(out / "best.pt", model, tokenizer)
                rows.append(f"{done},{loss:.9g},{measured},{group['lr']:.9g},{speed:.0f}\n")
                log.write(rows[-1])
                left = int((time.perf_counter() - begun) / (done - first) * (options.steps - done))
                line += f"  {speed:,.0f} tokens/s  {left // 60}:{left % 60:02} left"
                progress(line, keep=last or measured or done % options.sample_every == 0)
                if last or stop or done % options.save_every == 0:
                    state |= {"step": done, "options": vars(options), "batch": batch}
                    state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
                    state["log"] = "".join(rows)
                    save_checkpoint(out / "checkpoint.pt", model, tokenizer, state)
                if last or done % options.sample_every == 0:
                    prompt = tokenizer.encode(options.prompt, allowed_special="all")
                    prompt = torch.tensor([prompt or [tokenizer.eot_token]], device=device)
                    added = generate(model.eval(), prompt, 40, temperature=0)  # section 6
                    print(options.prompt + tokenizer.decode([*map(int, added)]), flush=True)
                    model.train()  # dropout on again
            if stop:
                break
        if world > 1:
            torch.distributed.barrier()  # one may still be saving
            del parallel  # it holds on to the group, whose threads have to end before Python does
            gc.collect()
            torch.distributed.destroy_process_group()
    if stop:
        progress(f"stopped after step {done}, saved; go on with --resume")
        raise SystemExit(128 + (signals or [signal.SIGTERM])[0])
    if rank == 0:
        summarise(out)
    return model


# ==================================================================================================
# 6 Decoding
# Three dials shape what is drawn. Temperature divides the logits: below 1 the probable becomes more
# so, 0 takes the best. Top-k leaves the k most probable tokens (Fan et al. 2018), top-p the fewest
# that reach p in sum (Holtzman et al. 2020). Temperature moves sums, not the top k: so it's first.
def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw the next token of each row: logits (B, V) -> int64 (B,). Ties at place k all stay."""
    if temperature < 1e-6:  # greedy: what is drawn from ever lower temperatures
        return logits.argmax(-1)
    logits = logits.float() / temperature  # (B, V)
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]  # (B, 1), found without sorting V numbers
        logits = logits.masked_fill(logits < kth, -math.inf)
    probabilities = torch.softmax(logits, -1)  # (B, V)
    if top_p is not None and top_p < 1:
        ordered, tokens = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # mass of the more probable; 0 for the first
        probabilities.scatter_(-1, tokens, ordered.masked_fill(before >= top_p, 0))
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


# A full window can't drop one token: all positions, so all keys and values, would change. So half
# goes, and a reread is rare: [ a b c d e f g h ] + i -> [ f g h i . . . . ], then room for 4 more.
# Each token reads every weight once: in 124M 0.5 GB, 11 ms at 44 GB/s; measured 20, 15 in products.
def generate(model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos=None,
             seed=None, use_cache=True, samples=1):  # fmt: skip
    """Yield the next token of each row, int64 (B * samples,), `samples` for each of prompt (B, T).
    After eos comes eos, until all rows are there. ValueError for logits that aren't finite."""
    context, device = model.config.context_length, prompt.device
    generator = torch.Generator(device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    window = prompt[:, -context:]  # (B, T)
    length, dtype = min(context, window.shape[1] + max_new_tokens), model.final_norm.weight.dtype
    cache = KVCache(model.config, len(prompt), length, device, dtype) if use_cache else None
    ended = torch.zeros(samples * len(prompt), dtype=torch.bool, device=device)
    for n in range(max_new_tokens):
        with torch.inference_mode():
            if window.shape[1] > context:
                window = window[:, -max(1, context // 2) :]
                if cache:
                    cache.length = 0
            logits = model(window[:, cache.length :] if cache else window, cache, last=True)[:, -1]
            if n == 0 and samples > 1:
                window, logits = (x.repeat_interleave(samples, 0) for x in (window, logits))
                for pair in cache.layers if cache else ():  # shared out to the rows
                    pair[:] = [buffer.repeat_interleave(samples, 0) for buffer in pair]
            require(logits.max().isfinite(), "the model's logits are not finite: bad weights")
            token = sample_token(logits, temperature, top_k, top_p, generator)
            if eos is not None:
                token = token.masked_fill(ended, eos)
                ended |= token == eos
            window = torch.cat((window, token.unsqueeze(1)), dim=1)
        yield token
        if ended.all():
            return


# ==================================================================================================
# 7 GPT-2 weights
# nn.Linear has x Wᵀ with W (out, in), OpenAI's conv1d() (src/model.py) x w with w (1, in, out), a
# convolution of width 1: w loses its first dimension and is transposed. t() moves no number: W lies
# column by column, which is fastest for a single row x; start() lays it row by row, for training.
GPT2_FILES = ["hparams.json", "encoder.json", "vocab.bpe", "model.ckpt.index"]
GPT2_FILES += ["model.ckpt.data-00000-of-00001"]
GPT2_LAYERS = {  # a layer in OpenAI's block h0, h1, ...: those in ours; variables w or g (gain), b
    "ln_1": ["norm_1"],  # g (C,), b (C,)
    "attn/c_attn": ["attention.query", "attention.key", "attention.value"],  # w (1, C, 3C)
    "attn/c_proj": ["attention.projection"],  # w (1, C, C), b (C,)
    "ln_2": ["norm_2"],  # g (C,), b (C,)
    "mlp/c_fc": ["feed_forward.expand"],  # w (1, C, 4C), b (4C,)
    "mlp/c_proj": ["feed_forward.projection"],  # w (1, 4C, C), b (C,)
}
NoRedirects = type("", (urllib.request.HTTPRedirectHandler,), {"redirect_request": lambda *_: None})


def download_gpt2(size, folder, url):
    """Fetch those of OpenAI's files that the folder lacks, from where it broke off; or OSError."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path in (Path(folder) / name for name in GPT2_FILES):
        part, address = Path(f"{path}.part"), f"{url}/{size}/{path.name}"
        if path.exists() or path.with_name("model.pt").exists():
            continue
        safe = re.match(r"https://|http://(127\.0\.0\.1|localhost|\[::1\])[:/]", address)
        require(safe and "@" not in address, f"{address}: only https is safe, or http from here")
        try:
            have = max(0, part.stat().st_size - 1) if part.exists() else 0  # an empty range fails
            request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"})
            with urllib.request.build_opener(NoRedirects).open(request, timeout=30) as answer:
                have = have if answer.status == 206 else 0  # else all of the file comes
                require(answer.length, "the server doesn't say how long the file is")
                total = have + answer.length
                with open(part, "r+b" if have else "wb") as file:
                    file.seek(file.truncate(have))
                    while chunk := answer.read1(1 << 20):
                        require(file.tell() or chunk.lstrip()[:1] != b"<", "a web page came")
                        file.write(chunk)
                        progress(f"{path} {file.tell() / 1e6:.1f} of {total / 1e6:.1f} MB", False)
            require(part.stat().st_size == total, "the connection broke")
            os.replace(part, path)
        except Exception as error:  # of urllib, http.client, the disk
            if getattr(error, "code", None) == 416:  # more is here than there: begin anew
                part.unlink()
            raise OSError(f"{address}: {error}; run it again to go on from there") from error
        progress(f"{path} {total / 1e6:.1f} MB")


def convert_gpt2(folder):
    """OpenAI's files -> (model, tokenizer): each variable used and each parameter set, once."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # TensorFlow talks when it starts
    try:
        import tensorflow
    finally:
        os.dup2(stderr, 2)
    hparams = json.loads((folder / "hparams.json").read_text())
    config = GPTConfig(*(hparams[f"n_{x}"] for x in ("vocab", "ctx", "embd", "head", "layer")))
    with torch.device("meta"):
        model = GPT(config)
    names = {"model/wte": ["token_embedding.weight"], "model/wpe": ["position_embedding.weight"]}
    names |= {"model/ln_f/g": ["final_norm.weight"], "model/ln_f/b": ["final_norm.bias"]}
    for n, (theirs, ours) in itertools.product(range(config.n_layer), GPT2_LAYERS.items()):
        weight = f"model/h{n}/{theirs}/{'g' if theirs.startswith('ln') else 'w'}"
        names[weight] = [f"blocks.{n}.{name}.weight" for name in ours]
        names[f"model/h{n}/{theirs}/b"] = [f"blocks.{n}.{name}.bias" for name in ours]
    weights = model.state_dict()  # to be replaced one by one
    reader = tensorflow.train.load_checkpoint(str(folder / "model.ckpt"))
    shapes = reader.get_variable_to_shape_map()
    for name in sorted(shapes.keys() ^ names.keys()):
        raise ValueError(f"{name} is {'missing' if name in names else 'unknown'}")
    for theirs, ours in names.items():
        rows, *columns = torch.cat([weights[name] for name in ours]).shape
        shape = [1, *columns, rows] if theirs.endswith("/w") else [rows, *columns]
        require(shapes[theirs] == shape, f"{theirs} is {shapes[theirs]}, not {shape}")
        array = reader.get_tensor(theirs)  # one at a time in memory
        array = array[0] if theirs.endswith("/w") else array.T  # so that .t() leaves its shape
        for name, part in zip(ours, np.split(array, len(ours), axis=-1), strict=True):
            weights[name] = torch.tensor(part).t()  # a copy (in, out), seen as (out, in)
    model.load_state_dict(weights, assign=True)
    return model, read_gpt2_tokenizer(folder)


def load_gpt2(folder, **changes):
    """(model, tokenizer) from OpenAI's five files or, from the second time on, from model.pt."""
    converted = Path(folder) / "model.pt"
    if not converted.exists():
        try:
            parts = convert_gpt2(Path(folder))
        except Exception as error:  # TensorFlow's, json's
            raise ValueError(f"{folder}: {error!r}; mend or delete it, then run again") from error
        save_checkpoint(converted, *parts)
        del parts  # before the same weights are mapped
    return load_checkpoint(converted, **changes)[:2]


# ==================================================================================================
# 8 Command line
def sample(**given):
    """Continue a prompt; prints to standard output, ValueError or OSError for a mistake."""
    options = Options("sample", **given)
    require(not (options.gpt2 and "checkpoint" in given), "leave out --gpt2 or --checkpoint")
    folder, checkpoint = Path(options.gpt2_folder, options.gpt2 or ""), options.checkpoint
    if options.gpt2:
        download_gpt2(options.gpt2, folder, options.gpt2_url)
    model, tokenizer = load_gpt2(folder) if options.gpt2 else load_checkpoint(checkpoint)[:2]
    device, dtype = prepare(options.device, options.dtype)
    model.to(device, dtype)  # a copy, where they differ from the file's
    if options.compile:
        model.compile(dynamic=True)
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    eos = None if options.ignore_eos else tokenizer.eot_token
    dials = (options.temperature, options.top_k, options.top_p, eos, options.seed)
    dials += (not options.no_cache, options.samples)
    texts, total, started = [text.encode()] * options.samples, 0, time.perf_counter()
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # holds back half a character
    streaming = options.samples == 1
    print(text * streaming, end="", flush=True)
    prompt = tokenizer.encode(text, allowed_special="all") or [tokenizer.eot_token]
    for tokens in generate(model, torch.tensor([prompt], device=device), options.tokens, *dials):
        for row, token in enumerate(tokens.tolist()):
            if token != eos:  # an ended row goes on with eos
                piece, total = tokenizer.decode_single_token_bytes(token), total + 1
                texts[row] += piece
                print(utf8.decode(piece) * streaming, end="", flush=True)
    seconds = time.perf_counter() - started
    print(utf8.decode(b"", final=True) * streaming, end="\n" * streaming)
    for n, continued in enumerate(texts[streaming:], start=1):
        print(f"--- sample {n} ---\n{continued.decode(errors='replace')}\n", flush=True)
    progress(f"{total} tokens in {seconds:.2f} s: {total / seconds:.1f} tokens per second")


def fail(message):
    """End with one line on standard error and status 2."""
    progress("", keep=False)  # over a line that was still being rewritten
    print("gpt.py: error:", *str(message).split(), file=sys.stderr)
    raise SystemExit(2)


def main(argv=None):
    """Train a GPT, or sample from one; SystemExit(2) for a user's mistake."""
    parser = argparse.ArgumentParser("gpt.py", allow_abbrev=False)
    commands, parser.error = parser.add_subparsers(dest="command", required=True), fail
    for run in (train, sample):
        sub = commands.add_parser(run.__name__, help=run.__doc__.split(";")[0], allow_abbrev=False)
        sub.error = fail
        for name, default, values, kind, text in Options.table(run.__name__):
            keywords = {"choices": values.split("|")} if "|" in values else {"type": kind}
            keywords = {"action": "store_true"} if values == "switch" else keywords
            text += f" [{default}]" if default is not None else ""
            name = "--" + name.replace("_", "-")
            sub.add_argument(name, default=argparse.SUPPRESS, help=text, **keywords)
    given = vars(parser.parse_args(argv))
    try:
        {"train": train, "sample": sample}[given.pop("command")](**given)
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except UnicodeDecodeError as error:
        fail(f"{given.get('data', 'the text')} is not UTF-8: {error}")
    except (ValueError, OSError) as error:
        fail(f"{error}; is that the right path?" if getattr(error, "errno", None) else error)
    except RuntimeError as error:
        if not (given.get("compile") or "memory" in str(error)):
            raise
        fail(f"{str(error)[:200]}; leave --compile out, or take a smaller model or batch")


if __name__ == "__main__":
    main()
