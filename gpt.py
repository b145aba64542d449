"""GPT-2 in one file. Read it from top to bottom, then run it.

A GPT (generative pre-trained transformer) is a neural network that continues text. It reads tokens
(words, pieces of words or single bytes) and gives every token in its vocabulary a score: how likely
is it to come next? We draw a token according to these scores, append it, and ask again. The scores
depend on millions of parameters, numbers that are random at first. Training nudges them until the
tokens that really come next score high. "Pre-trained" means trained first on a huge amount of text
of every kind. Further training on your own text is called fine-tuning. A transformer is built from
blocks in which tokens exchange information.

    python gpt.py train                             a small GPT learns a short story by heart
    python gpt.py sample --prompt "I HAD always"    it continues a text
    python gpt.py sample --gpt2 124M                OpenAI's GPT-2 continues it (downloads 500 MB)
    python gpt.py train --gpt2 124M --data my.txt   GPT-2 is fine-tuned on your text

The loss says how badly the model predicts. In the first command it starts near 10.8, like blind
guessing among 50,257 tokens, and ends below 0.5: the model recites the story. (Offline, the program
makes a vocabulary of 1,024 tokens from the story, and the loss starts near 6.9.) The validation
loss is measured on the story's last tenth, which isn't trained on. It falls while the model learns
what English looks like. It rises once the model knows the other nine tenths by heart, because it
then confidently predicts the words that it remembers, although the last tenth goes on differently.
This is overfitting. More text, dropout (section 2) or stopping earlier curbs it.

Sections 1 to 7 are the GPT. You can skip section 8 (plumbing) and section 9 (speed).

    1 Config    the numbers that define a model       6 Decoding  how text is drawn from a model
    2 Layers    attention and what surrounds it       7 Weights   how OpenAI's file becomes a model
    3 Model     embeddings, blocks, scores, loss      8 Plumbing  checkpoints, devices, options
    4 Data      from text to tokens to windows        9 Faster on a CPU
    5 Training  how the parameters are found

Shapes are written in letters: (B, T) -> (B, T, C). src/... is a file in github.com/openai/gpt-2.

    letter   meaning                                                        in GPT-2 124M
    B        batch: how many sequences are processed side by side           any number
    T        time: how many tokens of each sequence are read in one call    1 to 1,024
    S        tokens that can be seen: these T and those before them         1 to 1,024
    C        channels: how many numbers represent a token                   768
    H        how many attention heads work side by side                     12
    D        channels of one head, C / H                                    64
    V        vocabulary: how many different tokens there are                50,257
"""

import argparse
import codecs
import collections
import ctypes
import functools
import math
import os
import re
import shutil
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import regex
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

# ==================================================================================================
# 1 Config


class UserError(ValueError):
    """An error that the user can fix. The command line shows it as one line."""


def check(name, value, kind, low=0, high=1e18, choices=None):
    """Return the value as an int, float or str. Raises UserError if a number isn't between low and
    high, or a str isn't one of the choices."""
    expected = f"one of {choices}" if choices else f"{kind.__name__} from {low:g} to {high:g}"
    try:
        plain = kind(str(value))  # "5" becomes 5, but 1.5 isn't an int
        valid = kind is str or low <= plain <= high
        if choices:
            valid = plain in choices
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"{name} is {value!r}; expected: {expected}")
    return plain


@dataclass(frozen=True)
class GPTConfig:
    """A GPT's shape (default: GPT-2 124M). Raises UserError if no such model is possible. Source:
    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (the GPT-2 paper),
    section 2.3.

    Others pad the vocabulary to 50,304, a multiple of 128, because GPUs multiply such matrices
    faster. OpenAI's weights wouldn't fit into that model."""

    vocab_size: int = 50257  # V
    context_length: int = 1024  # the most tokens it can see at once
    n_embd: int = 768  # C
    n_head: int = 12  # H, must divide C
    n_layer: int = 12  # how many blocks
    dropout: float = 0.0  # share of numbers that training sets to 0
    by_hand: bool = False  # False: PyTorch's fast routines ("kernels"); True: the same, written out

    def __post_init__(self):
        for name in ("vocab_size", "context_length", "n_embd", "n_head", "n_layer"):
            size = check(name, getattr(self, name), int, low=1)
            object.__setattr__(self, name, size)  # how a frozen dataclass sets a field
        dropout = check("dropout", self.dropout, float, high=0.99)
        object.__setattr__(self, "dropout", dropout)
        if self.n_embd % self.n_head != 0:
            raise UserError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")


GPT2_CONFIGS = {  # named after the number of parameters; OpenAI first miscounted 124M as 117M
    "124M": GPTConfig(n_embd=768, n_head=12, n_layer=12),
    "355M": GPTConfig(n_embd=1024, n_head=16, n_layer=24),
    "774M": GPTConfig(n_embd=1280, n_head=20, n_layer=36),
    "1558M": GPTConfig(n_embd=1600, n_head=25, n_layer=48),
}
SMALL_CONFIG = GPTConfig(context_length=64, n_embd=384, n_head=6, n_layer=2)  # for a laptop
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
DTYPES = ["auto", "float32", "bfloat16", "float16"]


def option(default, help, **limits):
    """A dataclass field that is also a command-line option. limits: see check()."""
    return field(default=default, metadata={"help": help, "limits": limits})


@dataclass
class Options:
    """What `train` and `sample` share; sections 5 and 6 add their own. None means "not given".
    Raises UserError if a value is out of range."""

    prompt: str = option("I HAD always thought", "text to continue; sample: - is standard input")
    gpt2: str = option(None, "use OpenAI's GPT-2 of this size", choices=list(GPT2_CONFIGS))
    gpt2_folder: str = option("gpt2", "where OpenAI's files are kept")
    gpt2_url: str = option(GPT2_URL, "where they are downloaded from")
    seed: int = option(1, "all randomness follows from this number")
    device: str = option("auto", "where to compute", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = option("auto", "number format; auto is 16 bits on cuda", choices=DTYPES)

    def __post_init__(self):
        self.prompt = clean_text(self.prompt, "--prompt")
        for item in fields(self):
            value = getattr(self, item.name)
            given = value is not None or item.default is not None  # None may be a default
            if given and item.type is not bool:
                name = "--" + item.name.replace("_", "-")
                setattr(self, item.name, check(name, value, item.type, **item.metadata["limits"]))


# ==================================================================================================
# 2 Layers
# Inside the model, each token is represented by C numbers, which flow through all blocks: the
# residual stream. The two main parts of a block, attention and the feed-forward network (both
# below), don't rebuild these numbers. Each only adds a correction to them, the residual. Such sums
# also help training, which works with gradients. The gradient of a number tells how much the loss
# grows if the number grows a bit. Gradients are computed backward from the loss, and a sum passes
# them on unchanged. So even the first block gets a useful gradient. Source: He et al. 2016, "Deep
# Residual Learning".
#
# nn.Linear(m, n) turns m numbers x into n: x Wᵀ + b. Weights W (n, m) and bias b (n,) are learned.
#
# In training, dropout sets a random share of numbers to 0 and scales up the others to keep the
# mean. A model that can't rely on any one number learns less by heart. Dropout acts on embeddings
# (section 3), on attention weights, and on what attention and the feed-forward network add to the
# stream. A new model is in training mode: with dropout, its results vary until we call
# model.eval(). A huge corpus read once needs no dropout: it can't be learned by heart. Source:
# Srivastava et al. 2014, "Dropout".
class LayerNorm(nn.Module):
    """Give each token's C numbers mean 0 and variance 1, then scale and shift them.

        y = (x - mean) / sqrt(variance + eps) * weight + bias          (B, T, C) -> (B, T, C)

    The stream grows with every correction, but layers learn best from numbers of similar size. The
    learned weight and bias (C,) give each channel the scale and offset that suit the next layer.
    Source: Ba et al. 2016, "Layer Normalization", section 3; src/model.py, norm()."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.eps = 1e-5  # keeps the divisor above 0 if all channels are equal
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd))

    def forward(self, x):
        if not self.config.by_hand:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        x = x - x.mean(dim=-1, keepdim=True)  # (B, T, C) - (B, T, 1)
        variance = x.square().mean(dim=-1, keepdim=True)  # divided by C, not by C - 1
        # eps is inside the root. Outside, a variance of 0 would give the root an infinite gradient.
        x = x / torch.sqrt(variance + self.eps)
        return x * self.weight + self.bias


def gelu(x, by_hand):
    """A smooth version of max(0, x): x times the probability that a standard normal number is below
    x. Unlike max(0, x), it passes on some gradient for negative x, too. This tanh approximation is
    off by less than 0.0005. It was once faster than the exact GELU. GPT-2 was trained with it, and
    the exact one would shift its scores slightly. Source: Hendrycks and Gimpel 2016, "Gaussian
    Error Linear Units", section 2; src/model.py, gelu()."""
    if not by_hand:
        return F.gelu(x, approximate="tanh")
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    return 0.5 * x * (1 + torch.tanh(inner))


# Attention carries information from one token to another. From its C numbers, each token makes
# three vectors: a query (what am I looking for?), a key (what can I be found by?) and a value (what
# do I tell whoever finds me?). The score of a query and a key is their dot product, which is large
# if both point the same way. Softmax turns the scores s of a query into positive weights that sum
# to 1. The mask (below) hides later tokens. The query's token receives the weighted mean of the
# values:
#
#     softmax(s)[i] = exp(s[i]) / (exp(s[0]) + exp(s[1]) + ...)
#     attention(q, k, v) = softmax(q kᵀ / sqrt(D) + mask) v
#
# Unlike a layer's weights, attention weights are computed afresh for every text. What is learned is
# how to make queries, keys and values. If a query's scores are all equal (all 0, say), its token
# gets the mean of the values it can see. A score of 0 doesn't mean "ignore": exp(0) is 1.
#
# Why the square root? A score sums D products. Some are positive and some negative, so they partly
# cancel: the sum grows like sqrt(D), not like D. Undivided scores would make softmax put nearly all
# weight on one token. Then small changes in a score hardly matter, and little is learned.
#
# Why the mask? If a token could see the next one, the model would learn to copy the answer. The
# loss would fall to almost 0, but the model would be useless for writing, where the next token
# isn't there yet. So the mask adds -∞ to the scores of later tokens: exp(-∞) is 0. (-10,000 works,
# too, if real scores are far above it.) Because the mask comes before the softmax, the remaining
# weights still sum to 1. If we set weights to 0 after the softmax, the others would sum to less.
# Row t of the result depends only on tokens 0 to t, so one pass over a text trains predictions at
# all positions.
#
# An example with three tokens and D = 2 (sqrt(2) is 1.41):
#
#             q       k       v       q kᵀ / 1.41, masked    the weights, rounded    result
#   I       (1, 0)  (0, 1)  (1, 0)    0.00    -∞     -∞      1.00  0.00  0.00      (1.00, 0.00)
#   HAD     (0, 2)  (1, 0)  (0, 1)    1.41   0.00    -∞      0.80  0.20  0.00      (0.80, 0.20)
#   always  (1, 0)  (1, 1)  (1, 1)    0.00   0.71   0.71     0.20  0.40  0.40      (0.60, 0.80)
def attention(q, k, v, dropout=0.0):
    """The formula above, for all heads (see the class below): q (B, H, T, D), k and v (B, H, S, D)
    -> (B, H, T, D). The queries belong to the last T of the S tokens, so query i sees all tokens up
    to number S - T + i. Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1."""
    T = q.shape[2]
    S = k.shape[2]
    scores = q @ k.transpose(-2, -1)  # (B, H, T, D) @ (B, H, D, S) -> (B, H, T, S)
    scores = scores / math.sqrt(q.shape[-1])
    # For T = 2 and S = 3 this is [[True, True, False], [True, True, True]]. It is made anew each
    # time, which costs little.
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)
    scores = scores.masked_fill(~seen, -math.inf)
    weights = torch.softmax(scores, dim=-1)  # each row of (B, H, T, S) sums to 1, until dropout
    # Unlike nn.Dropout, F.dropout doesn't know about model.eval(). Outside training, we pass 0.
    weights = F.dropout(weights, dropout)
    return weights @ v  # (B, H, T, S) @ (B, H, S, D) -> (B, H, T, D)


class CausalSelfAttention(nn.Module):
    """Attention within a text, masked ("causal"), in H heads: (B, T, C) -> (B, T, C).

    One head can look for only one kind of thing. Each head reads all C channels and projects them
    down to its own D = C / H numbers, so H heads can look for H things at once: a verb, the name
    mentioned last, an opening quote. The heads' (D, C) matrices are stacked in one (C, C) matrix.
    Each row of it makes one number without the other rows, so stacking doesn't mix the heads.
    (OpenAI's code also stacks query, key and value: 3C rows.) The heads' results are put side by
    side. Then a learned projection mixes them, so what one head found can reach every channel.
    Source: Vaswani et al. 2017, section 3.2.2."""

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.layer = layer  # the block's number, for the cache (section 6)
        self.query = nn.Linear(config.n_embd, config.n_embd)
        self.key = nn.Linear(config.n_embd, config.n_embd)
        self.value = nn.Linear(config.n_embd, config.n_embd)
        self.projection = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        # (B, T, C) -> (B, T, H, D) -> (B, H, T, D). A token's C numbers lie side by side in memory,
        # head after head. A view straight to (B, H, T, D) would mix up tokens.
        B, T, C = x.shape
        H = self.config.n_head
        q = self.query(x).view(B, T, H, C // H).transpose(1, 2)
        k = self.key(x).view(B, T, H, C // H).transpose(1, 2)
        v = self.value(x).view(B, T, H, C // H).transpose(1, 2)
        if cache is not None:  # add those of earlier tokens (section 6)
            k, v = cache.extend(self.layer, k, v)  # (B, H, T, D) -> (B, H, S, D)
        dropout = self.config.dropout if self.training else 0.0
        if self.config.by_hand:
            y = attention(q, k, v, dropout)
        else:
            # is_causal lets query i see keys 0 to i: right for a text or a prompt. A single new
            # token may see all S keys and needs no mask. (GPT.forward refuses anything else.) The
            # kernel gives the result of attention() without storing all (T, S) scores.
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
        # -> (B, T, H, D) -> (B, T, C). The transpose leaves the numbers out of order in memory, so
        # reshape copies them. (Others write .contiguous().view(B, T, C).)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.dropout(self.projection(y))


class FeedForward(nn.Module):
    """Let each token work by itself on what it has gathered: gelu(x W₁ᵀ + b₁) W₂ᵀ + b₂.

    Attention only takes means. The feed-forward network draws conclusions from them. Each of the 4C
    hidden numbers looks for a pattern in the C numbers and says how strongly it's present. Each
    hidden number owns a row of W₂ᵀ, C numbers long. That row, multiplied by the hidden number, is
    added to the stream. Without the GELU, the two matrices would collapse into their product. Two
    thirds of a block's parameters are here. The width 4C goes back to Vaswani et al. 2017, section
    3.3. Source: src/model.py, mlp()."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.expand = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.projection = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        hidden = gelu(self.expand(x), self.config.by_hand)  # (B, T, C) -> (B, T, 4C)
        return self.dropout(self.projection(hidden))  # (B, T, 4C) -> (B, T, C)


class TransformerBlock(nn.Module):
    """Attention between tokens, then the feed-forward network on each: (B, T, C) -> (B, T, C).

    Both read the stream through a LayerNorm. The Transformer of 2017 normalised the stream after
    each sum. Its LayerNorms rescaled gradients on their way back, so training had to begin with
    tiny steps. With this "pre-LayerNorm", the stream is only sums, and training is steadier. But
    the stream is never normalised, so the model ends with one more LayerNorm. Source: GPT-2 paper,
    section 2.3; Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture"."""

    def __init__(self, config, layer):
        super().__init__()
        self.norm_1 = LayerNorm(config)
        self.attention = CausalSelfAttention(config, layer)
        self.norm_2 = LayerNorm(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x, cache=None):
        x = x + self.attention(self.norm_1(x), cache)
        return x + self.feed_forward(self.norm_2(x))


# ==================================================================================================
# 3 Model
#
#        tokens (B, T)                                 a block, opened up
#             |
#     token embedding + position embedding                x ----------.
#             |                                           |           |
#         (B, T, C)                                    norm_1         |
#             |                                           |           |
#          block 0                                    attention       |
#             |                                           |           |
#          block 1                                        + <---------'
#             |                                           |
#            ...                                          +-----------.
#             |                                           |           |
#      block n_layer - 1                               norm_2         |
#             |                                           |           |
#         final norm                                feed_forward      |
#             |                                           |           |
#     product with the token embedding                    + <---------'
#             |                                           |
#      logits (B, T, V)                                   x
#
# The model knows a token only as a number, from 0 to V - 1. Two learned tables turn it into C
# numbers: the token's row, its embedding, plus the row of its position. Without positions, a layer
# of attention would ignore the order of the tokens before it. (The Transformer of 2017 used fixed
# sines and cosines; GPT-2 learns positions.) A text longer than context_length doesn't fit. Any
# shorter text does, with the same parameters: each matrix acts on one token's C numbers at a time.
# Each block can look for what earlier blocks have found.
#
# The scores at the end are called logits. Each is the dot product of a position's C numbers, after
# the final norm, with one token's embedding. So this last layer, the output head (no relation to
# attention heads), has no matrix of its own. It is "tied" to the token embedding (a plain
# parameter, so that both can use it), for two reasons. Tokens with similar embeddings get similar
# scores (Press and Wolf 2017, "Using the Output Embedding to Improve Language Models"). And a
# separate matrix would add V C = 38.6 million parameters to 124M's 124.4 million: 163.0 in all.
class GPT(nn.Module):
    """tokens (B, T), int64 -> logits (B, T, V): at each position, a score for every possible next
    token. Raises UserError if the tokens don't fit into the context."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Parameter(torch.empty(config.vocab_size, config.n_embd))
        self.position_embedding = nn.Parameter(torch.empty(config.context_length, config.n_embd))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(config, n) for n in range(config.n_layer))
        self.final_norm = LayerNorm(config)
        # On PyTorch's "meta" device, tensors have a shape but no numbers. The numbers will come
        # from a file (section 7), so drawing random ones would waste time.
        if not self.token_embedding.is_meta:
            self.init_weights()

    def init_weights(self):
        """Draw matrices and embeddings at random, normal with mean 0 and standard deviation 0.02.
        Biases start at 0, LayerNorm weights at 1.

        OpenAI chose 0.02; it makes the first logits small. Each block adds two results to the
        stream. Their variances add up, so the sum of 2 n_layer results has sqrt(2 n_layer) times
        the standard deviation of one. So the matrices that make them, `attention.projection` and
        `feed_forward.projection`, start with 0.02 / sqrt(2 n_layer). Then the sum of all results is
        as large as one result would be with 0.02, however many blocks there are. LayerNorms don't
        prevent this growth: they only normalise what a block reads. Source: GPT-2 paper, section
        2.3. (OpenAI's src/model.py has 0.01 for positions and 0.02 for projections.)"""
        for name, parameter in self.named_parameters():
            if name.endswith("projection.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens, cache=None, last_only=False):
        """cache: keys and values of the tokens before these (section 6). If it isn't empty, tokens
        must come one by one. last_only: only the last position's logits, (B, 1, V)."""
        T = tokens.shape[1]
        start = 0 if cache is None else cache.length
        if start + T > self.config.context_length:
            raise UserError(f"{start + T} tokens, but only {self.config.context_length} positions")
        if start > 0 and T != 1:
            raise UserError(f"{T} tokens can't follow a cache that isn't empty; only one can")
        x = F.embedding(tokens, self.token_embedding)  # (B, T) -> (B, T, C)
        x = x + self.position_embedding[start : start + T]  # + (T, C), the same for each sequence
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, cache)  # (B, T, C)
        if cache is not None:
            cache.length = start + T
        if last_only:
            x = x[:, -1:]
        return self.head(self.final_norm(x))

    def head(self, x):
        """(B, T, C) @ (C, V) -> (B, T, V), each position by itself."""
        return F.linear(x, self.token_embedding)


# Softmax of the logits gives each token its probability of coming next. The probability of a text
# is the product of the probabilities of its tokens, each given the tokens before it. (The first is
# read but never predicted.) Training makes people's texts as probable as possible. The product is
# too small to store, but its logarithm is a sum, and a minus sign makes lower better. So the loss
# is the mean of -log p, where p is the model's probability for the token that really came.
#
# With natural logarithms, the unit is the nat. A loss of 3.0 means that p is typically exp(-3.0), 1
# in 20; 0 is certainty. exp(loss), here 20, is the perplexity: the model is as unsure as if it
# guessed among 20 tokens. A new model gives every token about 1 / V, so its loss starts near ln V,
# 10.8 for GPT-2. A text longer than the context is split into windows. A window's first tokens have
# little text before them and are predicted worse. To measure exactly, let windows overlap, and
# count only the later tokens of each. (Our validation windows don't overlap, so their loss is a
# little too high.)
def cross_entropy(logits, targets):
    """The mean of -log softmax(logits)[target], in nats, a scalar; logits (..., V), targets (...).

    By softmax's definition, -log p is the logarithm of the sum of all exp(logit), logsumexp, minus
    the target's logit. A logit's gradient is the probability of its token, minus 1 if this token is
    the target. (Since the loss is a mean, it is divided by the number of predictions.) All these
    gradients are 0 once the target has probability 1."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # 16 bits are too coarse
    chosen = logits.gather(dim=-1, index=targets.unsqueeze(-1)).squeeze(-1)  # (B, T, V) -> (B, T)
    return (logits.logsumexp(dim=-1) - chosen).mean()


# ==================================================================================================
# 4 Data
# A text is stored as bytes, numbers from 0 to 255: an English letter takes one, an é two, most
# emoji four. With a token for each byte, a model could write any text in any language. But texts
# would take many tokens, and a model sees only so many at once. So byte-pair encoding (BPE) turns
# the most frequent pair of neighbours into a new token, again and again. GPT-2's vocabulary has the
# 256 bytes, 50,000 merged pairs, and <|endoftext|>.
#
# Merging never crosses a word boundary. Otherwise "dog.", "dog!" and "dog?" could each become a
# token, and the model would learn "dog" three times. "I'd say 42!" is cut into the words  "I"  "'d"
# " say"  " 42"  "!". A space belongs to the word after it, so " say" and "say" are different
# tokens. (GPT-2's own files show this space as Ġ.) Source: GPT-2 paper, section 2.2;
# src/encoder.py.
#
# <|endoftext|> marked the end of each document in GPT-2's training. When a model writes it, the
# text has ended. A model that never saw it rarely writes it, so put <|endoftext|> between your
# documents. There is no start token: for an empty prompt, we feed <|endoftext|>. Joined documents
# are cut into equal windows, whatever their lengths, so training needs no padding token. Tokens can
# attend across <|endoftext|>, which does little harm: the model learns to ignore what came before
# it. In a text or prompt, <|endoftext|> stands for this token. (tiktoken by itself raises an error
# until you choose: this token, or the several ordinary tokens of its letters. We choose with
# allowed_special="all".)
END_OF_TEXT = "<|endoftext|>"
# In order: endings, as in I'm; letters (\p{L}), digits (\p{N}) or other signs, together with a
# space before them; white space. Of several spaces before a word, \s+(?!\S) takes all but the last,
# which joins the word.
WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The first command's text, Edith Wharton's "The Verdict". (In a notebook, there is no __file__.)
STORY = str(Path(globals().get("__file__", "gpt.py")).resolve().with_name("the-verdict.txt"))


def train_bpe(text, vocab_size):
    """Learn a vocabulary, {token as bytes: its number}: the 256 bytes, then merged pairs, up to
    vocab_size or until no pair is left.

    In the text " hug hug hugs pug", for example:

        the most frequent pair   u g, 4 times             becomes token 256, "ug"
        then                     h ug, 3 times            becomes token 257, "hug"
        then                     a space and hug, 3 times becomes token 258, " hug"

    At the second step, the pair of a space and h also occurs 3 times. Of equally frequent pairs,
    the last in byte order wins. A new text is cut into words and bytes in the same way. Then its
    pairs are merged in the order they were learned: " hugging" becomes " hug" g i n g. Source:
    Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", algorithm
    1."""
    counts = collections.Counter()  # {word: how often it occurs}
    for document in text.split(END_OF_TEXT):
        counts.update(regex.findall(WORDS, document))
    words = {word: [bytes([byte]) for byte in word.encode("utf-8")] for word in counts}
    pairs = collections.Counter()  # {two neighbouring tokens: how often they occur}
    places = collections.defaultdict(set)  # {two neighbouring tokens: words that have or had them}

    def count_pairs(word, times):
        for pair in zip(words[word], words[word][1:]):
            pairs[pair] += times
            places[pair].add(word)

    for word, times in counts.items():
        count_pairs(word, times)
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < vocab_size and any(pairs.values()):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[best[0] + best[1]] = len(ranks)
        for word in list(places[best]):  # no other word changes
            count_pairs(word, -counts[word])
            words[word] = merge_pair(words[word], best)
            count_pairs(word, counts[word])
    return ranks


def merge_pair(tokens, pair):
    """The tokens, with each occurrence of the pair merged into one token: h u g -> h ug."""
    merged = [tokens[0]]
    for token in tokens[1:]:
        if (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def make_tokenizer(ranks):
    """The tiktoken.Encoding of {token as bytes: its number}, with <|endoftext|> added."""
    special = {END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding("gpt.py", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)


def load_tokenizer(name=None, text=None):
    """The name "gpt2" gives GPT-2's tokenizer. A number N gives a new one of N tokens, learned from
    the text. tiktoken downloads GPT-2's vocabulary the first time. If that fails and no tokenizer
    was named, a new one gets 1,024 tokens. Raises UserError if that isn't possible either."""
    if name not in (None, "gpt2"):
        return learn_tokenizer(name, text)
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network, or a wrong file
        problem = f"GPT-2's vocabulary can't be downloaded ({type(error).__name__})"
        if name == "gpt2" or text is None:
            raise UserError(f"{problem}; go online, or set TIKTOKEN_CACHE_DIR") from error
    print(f"{problem}; learning 1,024 tokens from the text instead", file=sys.stderr)
    return learn_tokenizer(1024, text)


def learn_tokenizer(size, text):
    """A tokenizer of size tokens, one of them <|endoftext|>, learned from the text."""
    if text is None:
        raise UserError(f"--tokenizer is {size}; the tokens of a .bin file need gpt2")
    size = check("--tokenizer (unless gpt2)", size, int, low=257)
    return make_tokenizer(train_bpe(text, size - 1))


def clean_text(text, source):
    """The text with \\n as line end and without a byte-order mark. Raises UserError if it has zero
    bytes, isn't UTF-8 (Python reads invalid bytes as \\ud800 to \\udfff), or has so much white
    space in a row that tiktoken gives up."""
    wrong = re.search(r"[\0\ud800-\udfff]|(?<!\s)\s{900000}", text)
    if wrong:
        problem = "a zero byte, an invalid byte, or 900,000 white spaces in a row"
        raise UserError(f"{source} isn't UTF-8 text: at character {wrong.start():,} is {problem}")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def read_data(path):
    """The text of a UTF-8 file (of the story, if path is None), or the tokens of a .bin file, as
    little-endian uint16 (50,257 is below 65,536). A .bin is mapped into memory: each part is read
    only when it is needed, so it can be larger than the memory. Raises UserError if this fails."""
    path = path or STORY
    try:
        if path.endswith(".bin"):
            return np.memmap(path, dtype="<u2", mode="r")
        text = Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except (OSError, ValueError) as error:  # ValueError: a .bin is empty, or ends within a token
        problem = f"--data {path} can't be read: {error}"
        raise UserError(f"{problem}; it takes one file, a text or a .bin") from error
    return clean_text(text, f"--data {path}")


def check_tokens(tokens, path, vocab_size):
    """Raise UserError if a .bin doesn't hold GPT-2's tokens. This reads all of it, in pieces, so
    that memory doesn't grow with the file."""
    largest = 0
    for start in range(0, len(tokens), 2**24):
        piece = np.fromfile(path, dtype="<u2", count=2**24, offset=2 * start)
        largest = max(largest, piece.max())
    advice = "it must hold GPT-2's tokens as uint16, without a header"
    if largest >= vocab_size:
        raise UserError(f"--data {path} has token {largest:,}, not below {vocab_size:,}; {advice}")
    if len(tokens) > 1 and not tokens[1:2000:2].any():
        raise UserError(f"--data {path} has a zero in every second place, like uint32; {advice}")
    if largest < 256 and Path(path).with_name("meta.pkl").exists():
        raise UserError(f"--data {path} holds characters, as meta.pkl beside it shows; {advice}")


# A window has an input, context_length tokens of the text, and a target, the same tokens shifted by
# one: at each position, the token that comes next. (Some libraries take the same tokens twice and
# shift them inside the loss. Without any shift, the model would only learn to copy.) The stride is
# the distance from one window to the next. With context 4 and stride 2, the first two windows are
#
#     text               I     HAD      always    thought   Jack     Gis     burn
#     window 0, input    I     HAD      always    thought
#               target   HAD   always   thought   Jack
#     window 1, input                   always    thought   Jack     Gis
#               target                  thought   Jack      Gis      burn
#
# If the stride is equal to the context, windows lie back to back. Then each token is seen at only
# one position, always after the same text. A smaller stride makes them overlap. With stride 1,
# neighbours are nearly equal, so a thousand of them teach little more than a few. The default, 3/4
# of the context, is a compromise. (Other projects start windows at any token: stride 1.)
class SlidingWindows(Dataset):
    """Item i is (input, target), each int64 (context_length,). The input starts at token i *
    stride. tokens: a tensor, array or numpy.memmap, read only where needed."""

    def __init__(self, tokens, context_length, stride):
        self.tokens = tokens
        self.context_length = context_length
        # The last target is one token after the input, so the last window starts context_length + 1
        # tokens before the end. (A range ends before its second number.)
        self.starts = range(0, len(tokens) - context_length, stride)

    def __len__(self):
        return len(self.starts)  # 1,000 tokens, context 64, stride 32: 0, 32, ..., 928, so 30

    def __getitem__(self, i):
        start = self.starts[i]
        window = np.asarray(self.tokens[start : start + self.context_length + 1]).astype(np.int64)
        return torch.from_numpy(window[:-1]), torch.from_numpy(window[1:])


def make_windows(data, tokenizer, config, options):
    """(training windows, validation windows) from a text or tokens. Validation gets the text's end,
    at most about 64 windows. (Random windows would overlap with those trained on.) An end shorter
    than a window becomes one short window. Raises UserError if no window is left to train on."""
    if isinstance(data, str):
        tokens = tokenizer.encode_to_numpy(data, allowed_special="all")
    else:
        tokens = data
        check_tokens(tokens, options.data, config.vocab_size)
    context = options.context or config.context_length
    check("--context", context, int, high=config.context_length)
    stride = options.stride or max(1, context * 3 // 4)
    count = len(tokens) - int(len(tokens) * options.val_fraction)
    windows = SlidingWindows(tokens[:count], context, stride)
    if len(windows) == 0:
        raise UserError(f"--data has {count} tokens to train on; it needs {context + 1}")
    end = tokens[count:]
    end_context = min(context, max(1, len(end) - 1))  # a short end becomes one short window
    return windows, SlidingWindows(end, end_context, stride=max(end_context, len(end) // 64))


# ==================================================================================================
# 5 Training
# A GPT learns by repeating five lines, each time with a new batch:
#
#     loss = cross_entropy(model(inputs), targets)   forward: how badly does it predict this batch?
#     loss.backward()                                the gradient: how would a small change of each
#                                                    parameter change the loss?
#     clip_grad_norm_(model.parameters(), 1.0)       shorten the gradient if it is unusually long
#     optimizer.step()                               move each parameter a bit against its gradient
#     optimizer.zero_grad()                          clear the gradient
#
# backward() goes from end to beginning by the chain rule: the gradient of a layer's input is the
# gradient of its output times the layer's derivative. The new gradients are added to the old ones.
# Without zero_grad(), a step would also follow all earlier batches. The learning rate says how far
# a step goes.
@dataclass
class TrainOptions(Options):
    """The options of `train` and their defaults; brackets say what None stands for. From Python:
    train(TrainOptions(data="my.txt", steps=100))."""

    data: str = option(None, "UTF-8 text, or .bin: uint16 tokens [the story]")
    val_fraction: float = option(0.1, "share of the data for validation", high=0.99)
    tokenizer: str = option(None, "gpt2, or N: learn one of N tokens [gpt2; offline 1024]")
    stride: int = option(None, "tokens from one window to the next [3/4 of the context]", low=1)
    size: str = option(None, "shape of a new model [small]", choices=["small", *GPT2_CONFIGS])
    context: int = option(None, "tokens in a window [the size's]", low=1)
    n_layer: int = option(None, "blocks [the size's]", low=1)
    n_head: int = option(None, "attention heads [the size's]", low=1)
    n_embd: int = option(None, "channels [the size's]", low=1)
    dropout: float = option(0.0, "share of numbers set to 0; try 0.1 on small data", high=0.99)
    by_hand: bool = option(False, "run the hand-written arithmetic, not PyTorch's kernels")
    steps: int = option(260, "optimizer steps in all", low=1)
    batch_size: int = option(4, "windows read at once", low=1)
    accumulate: int = option(1, "batches whose gradients add up to one step", low=1)
    learning_rate: float = option(None, "highest learning rate [1.2e-3; with --gpt2 3e-5]")
    warmup: int = option(30, "steps until the learning rate peaks")
    weight_decay: float = option(0.1, "how strongly matrices are pulled towards 0")
    clip: float = option(1.0, "longer gradients are scaled down to this length", low=1e-9)
    compile: bool = option(False, "use torch.compile: a slow start, then faster steps")
    eval_every: int = option(20, "steps from one validation to the next", low=1)
    save_every: int = option(100, "steps from one checkpoint to the next", low=1)
    out: str = option("out", "folder for checkpoint.pt, best.pt and log.csv")

    def __post_init__(self):
        super().__post_init__()
        self.out = os.path.expanduser(self.out)  # ~ is the home folder
        if self.data is not None:  # so that --resume works from any folder
            self.data = os.path.abspath(os.path.expanduser(self.data))
        if self.learning_rate is None:  # large steps would destroy what GPT-2 has learned
            self.learning_rate = 3e-5 if self.gpt2 else 1.2e-3
        shape = (self.size, self.tokenizer, self.n_layer, self.n_head, self.n_embd)
        if self.gpt2 and any(shape):
            raise UserError("--gpt2 has its own shape: omit --size, --tokenizer, --n-layer, ...")


# The optimizer is AdamW (Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"). For
# each parameter it keeps two numbers: the running means of its gradients and of their squares, in
# which old values fade. A step subtracts learning rate * mean / sqrt(mean of squares) from the
# parameter. So a parameter moves by about the learning rate, however large its gradients are. If
# they keep changing sign, it hardly moves. (AdamW corrects for the means' start at 0. An epsilon of
# 1e-8 keeps the divisor above 0.)
#
# Weight decay, the W of AdamW, also subtracts learning rate * --weight-decay * parameter from
# matrices and embeddings: a weight stays large only if the data keeps asking for it. Biases and
# LayerNorm weights aren't decayed. They are too few to learn a text by heart, and a LayerNorm with
# weights near 0 would pass on only its bias.
def make_optimizer(model, weight_decay):
    """AdamW, after putting the numbers of each parameter in order: the fused (fast) version needs
    that. Each step updates AdamW's means: mean = beta * mean + (1 - beta) * new number. With beta
    0.9, the mean of the gradients covers about the last 10 steps. With 0.95, the mean of the
    squares covers about 20. Source: Brown et al. 2020, "Language Models are Few-Shot Learners",
    appendix B."""
    for parameter in model.parameters():
        # Row by row. OpenAI's matrices are stored column by column (section 7).
        parameter.data = parameter.data.contiguous()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)


def learning_rate(step, options):
    """The learning rate of step 1, 2, ..., options.steps. Source: Brown et al. 2020, appendix B.

    In the first --warmup steps it rises evenly to --learning-rate: early on, AdamW's means rest on
    few gradients, and full steps could go badly wrong. (We count steps from 1. From 0, the first
    step would have rate 0 and be wasted.) After the warm-up, the rate falls along half a cosine to
    a tenth: large steps get near a minimum of the loss, small ones then settle into it."""
    if step <= options.warmup:
        return options.learning_rate * step / options.warmup
    progress = (step - options.warmup) / (options.steps - options.warmup)  # 1 in the last step
    cosine = (1 + math.cos(math.pi * progress)) / 2  # falls from 1 to 0
    return options.learning_rate * (0.1 + 0.9 * cosine)


# Clipping. A gradient many times longer than usual would dominate AdamW's means for many steps. Its
# length, the norm, is the root of the sum of all squares. If the norm exceeds --clip, the gradient
# is scaled down to that length. Source: Pascanu et al. 2013, "On the difficulty of training
# recurrent neural networks".
#
# Accumulation. A batch too large for memory can be read in micro-batches. If each micro-batch's
# loss is divided by the number of micro-batches, the gradients add up to the gradient of the whole
# batch. (Undivided, they would be too long. AdamW would hardly notice, since it divides by their
# size, but clipping would.) --batch-size 4 --accumulate 2 gives the same steps as --batch-size 8
# (except for rounding and dropout masks). It halves the memory for the intermediate results that
# backward needs, the activations, but takes more time.
#
# 16 bits. GPUs multiply 16-bit numbers much faster than 32-bit ones. In training, under "autocast",
# matrix products run in 16 bits. The stream, LayerNorms, the loss, parameters, their gradients and
# AdamW's means stay in float32 (Micikevicius et al. 2018, "Mixed Precision Training"). bfloat16 has
# the range of float32 but few digits. float16 has more digits but a small range, 6e-8 to 65,504. So
# on CUDA (NVIDIA) GPUs, training uses bfloat16 if the GPU has it. Sampling on them turns the whole
# model into float16, for its digits.
#
# GPUs without bfloat16 train in float16. During backward, the gradients of 16-bit results have 16
# bits as well, and tiny ones become 0. So a scaler multiplies the loss, and thus every gradient, by
# a large scale factor. Before clipping, the scaler divides gradients by this factor. A gradient
# that overflows becomes inf, or NaN where inf is subtracted from inf. Then the scaler skips the
# step and halves the factor. After 2,000 good steps, it doubles the factor. If a number in the
# forward pass exceeds 65,504, the loss can become NaN. A scaler can't help then, and the run stops.
# With its range, bfloat16 needs no scaler.
#
# Several processes, one for each GPU, hold the same model and optimizer but read different windows
# (`torchrun --nproc_per_node=2 gpt.py train` starts two). DistributedDataParallel (DDP) averages
# their gradients, so the models stay the same. Sending gradients takes time, so DDP does it only in
# the backward pass of the last micro-batch, when the gradients are complete. Each process reads its
# own --batch-size windows, so two processes read twice as many in a step.
RANK = int(os.environ.get("RANK", "0"))  # torchrun numbers the processes from 0
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))  # the number within one machine
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))  # how many processes


def wrap(model, options):
    """The model as training_step() calls it: for several processes (which wait for each other
    here), and compiled on request."""
    if WORLD_SIZE > 1:
        torch.distributed.init_process_group()
        model = nn.parallel.DistributedDataParallel(model)
    return torch.compile(model) if options.compile else model


def training_step(model, batches, optimizer, scaler, autocast, clip):
    """One step on micro-batches; returns the mean loss over all processes. Raises UserError, before
    parameters change, if the loss or (without a scaler) the gradient isn't finite."""
    total = 0.0
    for number, (inputs, targets) in enumerate(batches, start=1):
        if WORLD_SIZE > 1:
            model.require_backward_grad_sync = number == len(batches)  # DDP averages only then
        with autocast:
            loss = cross_entropy(model(inputs), targets) / len(batches)
        scaler.scale(loss).backward()
        total += loss.detach()
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(total)  # the sum over all processes
    mean = total.item() / WORLD_SIZE
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip).item()
    finite = math.isfinite(mean) and (math.isfinite(norm) or scaler.is_enabled())
    if not finite:
        problem = f"training diverged: the loss is {mean}, the norm of its gradient {norm}"
        raise UserError(f"{problem}; use --resume with a lower --learning-rate")
    scaler.step(optimizer)  # after an overflow, it skips the step
    scaler.update()
    optimizer.zero_grad()
    return mean


def draw_batches(windows, step, options, device):
    """The windows of a step, as micro-batches [(inputs, targets), ...], (B, T) each.

    They're drawn at random, because a batch read in order would show only one passage, and with
    replacement, so that nobody has to remember which windows were used. They depend only on seed
    and step, so a resumed run draws the same batches as an uninterrupted one. Process r of N takes
    window r and every N-th one after it. There are no epochs: the first run draws 1,040 windows
    from 96, so it reads each about 11 times. (Another seed changes windows, dropout masks and first
    parameters, not the data or its split.)"""
    rng = np.random.default_rng((options.seed, step))
    count = options.batch_size * options.accumulate * WORLD_SIZE
    numbers = rng.integers(len(windows), size=count)[RANK::WORLD_SIZE]
    batches = DataLoader(Subset(windows, numbers), options.batch_size)
    return [(inputs.to(device), targets.to(device)) for inputs, targets in batches]


@torch.no_grad()
def evaluate(model, windows, batch_size, autocast):
    """The mean loss over all windows, without dropout. no_grad: nothing is kept for backward."""
    model.eval()
    device = model.token_embedding.device
    total = 0.0
    for inputs, targets in DataLoader(windows, batch_size):
        with autocast:
            loss = cross_entropy(model(inputs.to(device)), targets.to(device))
        total += loss.item() * len(inputs)  # the last batch can be smaller
    return total / len(windows)


# Time. For each token, nearly all P parameters take part in a multiplication and an addition: 2
# operations. backward takes 4 more, for the gradients of the weight and of its input: 6 P in all.
# In each block, a token's scores take 2 T C operations and the mean of the values another 2 T C.
# backward takes twice as many, which makes 12 T C a block. For 124M with T = 1,024, the parameters
# take 0.75 billion operations a token, and attention in all blocks 0.11 billion.
#
# Memory. A parameter takes 16 bytes: 4 each for itself, its gradient, and each of AdamW's two
# numbers. For 124M, that's 2 GB. The activations grow with B T. The float32 logits alone take 4 B T
# V bytes: 206 MB for a window of 1,024 tokens. If memory is short, lower --batch-size and raise
# --accumulate, or shorten --context.
#
# best.pt is the model with the lowest validation loss. checkpoint.pt is the latest model, with all
# that --resume needs: AdamW's numbers, scale factor, step, options and log. So it's three times as
# large as the weights. --resume may change all options except --gpt2, --context, shape and
# vocabulary.
def train(options, run=None):
    """Train a GPT and return it. run: (model, tokenizer, data, training_state) of a run to
    continue. Raises UserError for what the user can fix."""
    device, dtype = choose_device(options, training=True)
    speed_up_training()  # section 9
    if run is None:
        run = new_run(options)
    model, tokenizer, data, state = run
    # The loaded model may have another dropout or by_hand. So we build a model with this run's
    # settings around the same parameters.
    config = replace(model.config, dropout=options.dropout, by_hand=options.by_hand)
    model = model_from(config, model.state_dict()).to(device)
    windows, validation = make_windows(data, tokenizer, config, options)
    optimizer = make_optimizer(model, options.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if state["step"] > 0:
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0]["weight_decay"] = options.weight_decay  # it may have changed
        if state["scaler"]:  # not if the run was in another dtype
            scaler.load_state_dict(state["scaler"])
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    wrapped = wrap(model, options)
    if RANK == 0:
        start_run(options, state, model, tokenizer, windows)

    for step in range(state["step"] + 1, options.steps + 1):
        started = time.perf_counter()
        batches = draw_batches(windows, step, options, device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        model.train()  # dropout is on; its masks depend only on seed, step and process
        torch.manual_seed(options.seed + 1000 * step + RANK)  # for up to 1,000 processes
        loss = training_step(wrapped, batches, optimizer, scaler, autocast, options.clip)

        # The training part of a step ends here. Now the first process measures, shows and saves.
        # (The others wait for it in the next step.)
        if RANK == 0:
            seconds = time.perf_counter() - started
            tokens = WORLD_SIZE * sum(inputs.numel() for inputs, _ in batches)
            last = step == options.steps
            val_loss = None
            if len(validation) > 0 and (last or step % options.eval_every == 0):
                val_loss = evaluate(model, validation, options.batch_size, autocast)
                if val_loss < state["best_val_loss"]:
                    state["best_val_loss"] = val_loss
                    save_checkpoint(Path(options.out, "best.pt"), model, tokenizer)
            state["step"] = step
            log_step(options, state, loss, val_loss, seconds=seconds, tokens=tokens)
            if last or step % options.save_every == 0:
                state["optimizer"] = optimizer.state_dict()
                state["scaler"] = scaler.state_dict()
                save_checkpoint(Path(options.out, "checkpoint.pt"), model, tokenizer, state)
                model.eval()
                write_text(model, tokenizer, options.prompt, max_new_tokens=40, temperature=0)
    if WORLD_SIZE > 1:
        del wrapped  # before the group ends; otherwise a process sometimes aborts
        torch.distributed.destroy_process_group()
    return model.eval()


# ==================================================================================================
# 6 Decoding
# If we always take the most probable token ("greedy"), the text runs in circles: one repetition
# makes another more likely. If we draw each token with its probability, the text contains blunders:
# thousands of tokens don't fit, and now and then one of them is drawn. Three settings offer a
# middle way (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration").
#
# Temperature divides the logits. Since p is proportional to exp(logit), this raises p to the power
# 1 / temperature. Below 1, the probable becomes more probable; 0 means greedy. Top-k keeps the k
# most probable tokens (Fan et al. 2018, "Hierarchical Neural Story Generation"). Top-p keeps the
# most probable tokens until their probabilities sum to p or more: few where the model is sure, many
# where it isn't. The probabilities that are kept are divided by their sum.
#
# The order is temperature, top-k, top-p. Each works on what the one before has left. So top-p adds
# up the probabilities that are really used for drawing:
#
#     four tokens have the probabilities            0.40  0.30  0.20  0.10
#     temperature 0.5: squared, divided by 0.30     0.53  0.30  0.13  0.03
#     top-k 3: the last is dropped                  0.55  0.31  0.14  0
#     top-p 0.8: one is too few, two have 0.86      0.64  0.36  0     0
@dataclass
class SampleOptions(Options):
    """The options of `sample`; from Python: sample(SampleOptions(prompt="Once", tokens=50))."""

    checkpoint: str = option(None, "a model trained here [out/checkpoint.pt]")
    tokens: int = option(100, "how many tokens to add at most", low=1)
    temperature: float = option(0.8, "lower is safer, higher is wilder, 0 is greedy")
    top_k: int = option(50, "draw from the k most probable tokens; 0: from all")
    top_p: float = option(1.0, "draw from the most probable tokens that sum to p; 0: all", high=1)
    samples: int = option(1, "how many texts", low=1)
    ignore_eos: bool = option(False, "continue after <|endoftext|>")


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw the next token of each row: logits (B, V) -> int64 (B,). generator: a torch.Generator.
    None or 0 turns top_k or top_p off. Ties at the k-th place are all kept, as in src/sample.py."""
    if temperature < 1e-6:  # 0, or so near that dividing might overflow
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature  # (B, V)
    if top_k and top_k < logits.shape[-1]:
        kth_largest = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth_largest, -math.inf)
    probabilities = torch.softmax(logits, dim=-1)  # (B, V)
    if top_p and top_p < 1:
        ordered, tokens = probabilities.sort(dim=-1, descending=True)
        sum_before = ordered.cumsum(dim=-1) - ordered  # the probability of all before it
        ordered = ordered.masked_fill(sum_before >= top_p, 0.0)
        probabilities = probabilities.scatter(-1, tokens, ordered)  # back to the tokens' places
    # multinomial divides by the sum of what is left.
    return torch.multinomial(probabilities, num_samples=1, generator=generator).squeeze(-1)


# A new token attends to the keys and values of all tokens before it. Thanks to the mask, these
# don't depend on later tokens, so a cache can keep them. Then only one row, the new token's, goes
# through the blocks, and the result is the same as recomputing everything. (A prompt needs the mask
# as well. Without it, its keys and values would depend on later tokens, unlike in training.)
# Queries aren't kept: each is used once, by its own token. In 124M, a token's keys and values are 2
# n_layer C numbers, in float32 72 KiB. The buffers hold a full context, 72 MiB, from the start.
#
# For a new token, each weight is read from memory for one multiplication and one addition. So
# memory speed limits decoding, and 16-bit weights can make it twice as fast. In training, a weight
# is read once for all B T rows of a batch, so arithmetic is the limit.
class KVCache:
    """The keys and values of the tokens read so far, for a batch of texts of the same length. GPT-2
    has no padding token, so texts of different lengths are continued one by one."""

    def __init__(self, config):
        self.capacity = config.context_length
        self.keys = [None] * config.n_layer  # for each block, (B, H, capacity, D)
        self.values = [None] * config.n_layer
        self.length = 0  # tokens it holds; GPT.forward keeps count

    def extend(self, layer, k, v):
        """Append a block's new keys and values, (B, H, T, D); returns all of them, (B, H, S, D)."""
        start = self.length
        end = start + k.shape[2]
        if start == 0:  # the first ones fix batch size, device and dtype
            B, H, _, D = k.shape
            self.keys[layer] = k.new_empty(B, H, self.capacity, D)
            self.values[layer] = v.new_empty(B, H, self.capacity, D)
        self.keys[layer][:, :, start:end] = k
        self.values[layer][:, :, start:end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


# A full context has no position for one more token. If we dropped just its first token, all others
# would move to new positions and need new keys and values, again for every new token. So we keep
# the newest half of the tokens, including the new one, and read them again at positions 0, 1, ...
#     [ a b c d e f g h ] + i   becomes   [ f g h i . . . . ]
# With 1,024 positions, this happens about every 512 tokens. One pass of 512 tokens costs far less
# than 512 passes of one. The model forgets what was dropped.
@torch.no_grad()
def generate(
    model, prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eos=None, seed=None
):
    """Yield the next token of each row, int64 (B,), up to max_new_tokens times.

    prompt: int64 (B, T), of which the last context_length tokens are read. Raises UserError if it
    isn't such a tensor. A row that has produced eos, the end-of-text token, continues with eos.
    Once every row has produced it, generate ends. Without a seed, PyTorch's global generator is
    used."""
    if not isinstance(prompt, torch.Tensor) or prompt.dim() != 2 or prompt.numel() == 0:
        given = getattr(prompt, "shape", type(prompt).__name__)
        raise UserError(f"the prompt is {given}; it must be a non-empty tensor of tokens (B, T)")
    context_length = model.config.context_length
    generator = None  # PyTorch's global one
    if seed is not None:
        generator = torch.Generator(prompt.device).manual_seed(seed)
    window = prompt[:, -context_length:]  # (B, T)
    cache = KVCache(model.config)
    ended = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    for _ in range(max_new_tokens):
        if window.shape[1] > context_length:
            window = window[:, -max(1, context_length // 2) :]
            cache.length = 0
        unread = window[:, cache.length :]  # the prompt at first, later only the newest token
        logits = model(unread, cache, last_only=True)[:, -1]  # (B, V)
        token = sample_token(logits, temperature, top_k=top_k, top_p=top_p, generator=generator)
        if eos is not None:
            token = token.masked_fill(ended, eos)
            ended = ended | (token == eos)
        window = torch.cat([window, token.unsqueeze(1)], dim=1)
        yield token
        if ended.all():
            return


def write_text(model, tokenizer, text, max_new_tokens, eos=None, **settings):
    """Print a text and its continuation; returns how many tokens are new. A character spread over
    several tokens is held back until complete: alone, its parts print as replacement characters."""
    tokens = tokenizer.encode(text, allowed_special="all") or [tokenizer.eot_token]
    prompt = torch.tensor([tokens], device=model.token_embedding.device)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    count = 0
    print(text, end="", flush=True)
    for token in generate(model, prompt, max_new_tokens, eos=eos, **settings):
        if token.item() != eos:
            new = decoder.decode(tokenizer.decode_single_token_bytes(token.item()))
            print(new, end="", flush=True)
            count += 1
    print(decoder.decode(b"", final=True))
    return count


def sample(options):
    """Continue a prompt: the text goes to standard output, its speed to standard error."""
    device, dtype = choose_device(options, training=False)
    if options.gpt2 and options.checkpoint:
        raise UserError("--gpt2 and --checkpoint are two models: omit one of them")
    if options.gpt2:
        model, tokenizer = open_gpt2(options)
    else:
        path = os.path.expanduser(options.checkpoint or "out/checkpoint.pt")
        model, tokenizer, state = load_checkpoint(path)
        if state:
            show(f"{path}, after {state['step']} steps")
    # A model made in Python can have a padded vocabulary (section 1). Its extra rows belong to no
    # token and mustn't be drawn.
    model.token_embedding.data = model.token_embedding.data[: tokenizer.n_vocab]
    model.to(device, dtype)
    speed_up_decoding(model)  # section 9
    text = options.prompt
    if text == "-":
        text = clean_text(sys.stdin.read(), "standard input").removesuffix("\n")
    settings = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    eos = None if options.ignore_eos else tokenizer.eot_token
    started = time.perf_counter()
    count = 0
    for index in range(options.samples):
        if options.samples > 1:
            print(f"--- sample {index + 1} ---")
        seed = options.seed + index
        count += write_text(model, tokenizer, text, options.tokens, eos, seed=seed, **settings)
    seconds = time.perf_counter() - started
    show(f"{count} tokens in {seconds:.2f} s: {count / seconds:.1f} tokens per second")


# ==================================================================================================
# 7 Weights
# The large file of OpenAI's TensorFlow checkpoint holds only the float32 numbers of all variables,
# without gaps, in alphabetical order of their names:
#
#     model/h0/attn/c_attn/b   model/h0/attn/c_attn/w   ...   model/h0/mlp/c_proj/w
#     model/h1/...   model/h10/...   model/h11/...   model/h2/...   ...   model/h9/...
#     model/ln_f/b   model/ln_f/g   model/wpe   model/wte
#
# So block 1 stands between model/h0/mlp/c_proj/w and model/h10/attn/c_attn/b. The output head isn't
# there, because it is tied to model/wte. (Other copies of GPT-2 also store the mask, as attn.bias,
# and its -10,000, as attn.masked_bias. They aren't learned and can be dropped.)
#
# The file is mapped into memory, and our parameters are views of it. Loading neither copies nor
# computes anything. OpenAI's matrices differ only in how we look at them:
#
#     nn.Linear             x Wᵀ + b     with W (out, in)
#     OpenAI's conv1d()     x w + b      with w (in, out)
#
# So W is w.t(), a view with rows and columns exchanged. No number moves. In c_attn, three matrices
# stand side by side: query, key and value each take a third of w's columns, which are W's rows. The
# embeddings stay as they are.
GPT2_FILE = "model.ckpt.data-00000-of-00001"
GPT2_NAMES = {  # OpenAI's name and ours, in each block
    "ln_1": ["norm_1"],
    "attn/c_attn": ["attention.query", "attention.key", "attention.value"],
    "attn/c_proj": ["attention.projection"],
    "ln_2": ["norm_2"],
    "mlp/c_fc": ["feed_forward.expand"],
    "mlp/c_proj": ["feed_forward.projection"],
}


def load_gpt2(path, config, **changes):
    """OpenAI's GPT, from its file. changes: config fields to replace. Raises UserError if the
    file's length doesn't match the config. The names are from src/model.py."""
    config = replace(config, **changes)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    found = os.path.getsize(path)
    expected = 4 * sum(shape.numel() for shape in shapes.values())  # in bytes
    if found != expected:
        advice = "it is incomplete (curl -C - continues a download), or of another size"
        raise UserError(f"{path} has {found:,} bytes, not {expected:,}; {advice}")
    names = {"wte": ["token_embedding"], "wpe": ["position_embedding"]}
    names |= {"ln_f/g": ["final_norm.weight"], "ln_f/b": ["final_norm.bias"]}
    for n in range(config.n_layer):
        for theirs, ours in GPT2_NAMES.items():
            letter = "g" if theirs.startswith("ln") else "w"  # g, the gain, is a LayerNorm's weight
            names[f"h{n}/{theirs}/{letter}"] = [f"blocks.{n}.{name}.weight" for name in ours]
            names[f"h{n}/{theirs}/b"] = [f"blocks.{n}.{name}.bias" for name in ours]
    # Mode c, copy on write: training changes the memory, never the file.
    numbers = torch.from_numpy(np.memmap(path, dtype="<f4", mode="c"))
    weights = {}
    for theirs, ours in sorted(names.items()):
        shape = shapes[ours[0]]
        size = len(ours) * shape.numel()
        variable = numbers[:size]
        numbers = numbers[size:]
        if theirs.endswith("/w"):
            variable = variable.view(shape[1], -1).t()  # (in, out) -> (out, in)
        for name, part in zip(ours, variable.chunk(len(ours))):
            weights[name] = part.view(shape)
    return model_from(config, weights)


def model_from(config, weights):
    """A GPT whose parameters are these tensors themselves, not copies."""
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def open_gpt2(options):
    """OpenAI's model and tokenizer, downloaded if missing."""
    tokenizer = load_tokenizer("gpt2")
    config = GPT2_CONFIGS[options.gpt2]
    path = Path(options.gpt2_folder, options.gpt2, GPT2_FILE).expanduser()
    if not path.exists():
        download(f"{options.gpt2_url}/{options.gpt2}/{GPT2_FILE}", path, config)
    return load_gpt2(path, config), tokenizer


def download(url, path, config):
    """Fetch OpenAI's file. The file gets its name only once it's complete. Raises UserError
    otherwise."""
    print(f"downloading {url} to {path}", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder, GPT2_FILE)
        try:
            torch.hub.download_url_to_file(url, str(new))
            load_gpt2(new, config)  # checks its length
        except Exception as error:  # downloads fail in many ways
            raise UserError(f"can't download {url} to {path} ({error}); try again") from error
        os.replace(new, path)


# ==================================================================================================
# 8 Plumbing
def save_checkpoint(path, model, tokenizer, training_state=None):
    """Write a model and its tokenizer. If that fails midway, the old file survives."""
    content = {
        "format": 3,
        "config": asdict(model.config) | {"by_hand": False},  # not a property of the weights
        # Copies: for a parameter that views OpenAI's file, torch.save would store the whole file.
        "weights": {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()},
        "vocabulary": [tokenizer.decode_single_token_bytes(n) for n in range(tokenizer.eot_token)],
        "training_state": training_state,
    }
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it gets its name
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # PyTorch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"can't write {path} ({error}); what was there is unchanged") from error


def load_checkpoint(path, mapped=True, **changes):
    """(model, tokenizer, training_state or None). changes: config fields to replace. mapped:
    weights are read from the file when they are needed, so don't replace it while the model is in
    use. Raises UserError if the file is damaged or foreign. Code hidden in it is never run."""
    if os.path.isdir(path):
        path = Path(path, "checkpoint.pt")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares checksums; torch.load doesn't
        content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
        if damaged or content["format"] != 3:
            raise ValueError(damaged)
        config = GPTConfig(**content["config"] | changes)
        ranks = {token: rank for rank, token in enumerate(content["vocabulary"])}
    except Exception as error:  # a wrong file fails in many ways
        raise UserError(f"{path} is missing, damaged, or not a checkpoint of gpt.py") from error
    model = model_from(config, content["weights"])  # not in try: bugs keep their traceback
    return model, make_tokenizer(ranks), content["training_state"]


def choose_device(options, training):
    """The (torch.device, torch.dtype) that --device and --dtype ask for. Raises UserError if this
    machine can't do what the options need."""
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    name = best.type if options.device == "auto" else options.device
    if name not in ("cpu", best.type):
        raise UserError(f"--device is {name}, but this machine has only {best.type}")
    if training and options.compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("--compile needs a C++ compiler: install g++, or set CXX to yours")
    if training and WORLD_SIZE > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(f"WORLD_SIZE is {WORLD_SIZE}: start with torchrun, or unset it")
    dtype = "float32"
    if name == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if training and has_bfloat16 else "float16"
    if options.dtype != "auto":
        dtype = options.dtype
    return torch.device(name), getattr(torch, dtype)


def new_run(options):
    """(model, tokenizer, data, training_state) of a new run. Raises UserError if --out already
    holds a run or can't be written to."""
    out = options.out
    if any(Path(out, name).exists() for name in ("checkpoint.pt", "best.pt", "log.csv")):
        raise UserError(f"{out} already holds a run; add --resume, or name another --out")
    writable = os.path.isdir(out) and os.access(out, os.W_OK)
    if out == "" or (os.path.exists(out) and not writable):
        raise UserError(f"--out {out!r} isn't a folder that can be written to; name another one")
    data = read_data(options.data)
    if options.gpt2:
        model, tokenizer = open_gpt2(options)
    else:
        tokenizer = load_tokenizer(options.tokenizer, data if isinstance(data, str) else None)
        config = GPT2_CONFIGS.get(options.size, SMALL_CONFIG)
        shape = {"n_layer": options.n_layer, "n_head": options.n_head, "n_embd": options.n_embd}
        shape |= {"context_length": options.context, "vocab_size": tokenizer.n_vocab}
        config = replace(config, **{name: size for name, size in shape.items() if size})
        torch.manual_seed(options.seed)  # for the parameters
        model = GPT(config)
    return model, tokenizer, data, {"step": 0, "best_val_loss": math.inf, "log": []}


def resume(out="out", **given):
    """Continue a run with its own options, except for those given; returns the model. Raises
    UserError if one would change the model."""
    path = Path(out, "checkpoint.pt").expanduser()
    # Not mapped, because this run replaces the file.
    model, tokenizer, state = load_checkpoint(path, mapped=False)
    if state is None:
        raise UserError(f"{path} is only a model; there is no run to continue")
    saved = TrainOptions(**state["options"])
    options = replace(saved, out=out, **given)
    for name in ("gpt2", "size", "tokenizer", "context", "n_layer", "n_head", "n_embd"):
        if getattr(options, name) != getattr(saved, name):
            raise UserError(f"a resumed run keeps its model: omit --{name.replace('_', '-')}")
    if options.steps <= state["step"]:
        raise UserError(f"{path} has taken all {state['step']} steps; give it more with --steps")
    return train(options, (model, tokenizer, read_data(options.data), state))


def start_run(options, state, model, tokenizer, windows):
    """Show what is trained, and rewrite log.csv from the rows stored in the checkpoint. A new run
    is saved at once, so that --resume always works."""
    size = sum(parameter.numel() for parameter in model.parameters())
    show(f"{size:,} parameters learn from {len(windows):,} windows of {windows.context_length}")
    show(f"{options.out} gets checkpoint.pt (the latest), best.pt (lowest val) and log.csv")
    count = len(windows.tokens)
    if state.get("tokens", count) != count:
        show(f"(The data has changed: {count:,} tokens instead of {state['tokens']:,}.)")
        state["best_val_loss"] = math.inf  # it was measured on other text
    state["tokens"] = count
    state["options"] = asdict(options)
    if state["step"] == 0:
        save_checkpoint(Path(options.out, "checkpoint.pt"), model, tokenizer, state)
    rows = ["step,train_loss,val_loss,learning_rate,tokens_per_second", *state["log"]]
    Path(options.out, "log.csv").write_text("\n".join(rows) + "\n")


def log_step(options, state, loss, val_loss, seconds, tokens):
    """Log and show a step; its speed is tokens / seconds."""
    step = state["step"]
    speed = tokens / seconds
    val = "" if val_loss is None else f"{val_loss:.9g}"
    row = f"{step},{loss:.9g},{val},{learning_rate(step, options):.9g},{speed:.0f}"
    state["log"].append(row)
    with open(Path(options.out, "log.csv"), "a") as log:
        log.write(f"{row}\n")
    line = f"step {step}/{options.steps}  loss {loss:.3f}"
    if val_loss is not None:
        line += f"  val {val_loss:.3f}"
    left = round(seconds * (options.steps - step))
    keep = val_loss is not None or step in (1, options.steps) or step % options.save_every == 0
    show(f"{line}  {speed:,.0f} tokens/s  {left // 60}:{left % 60:02} left", keep=keep)


def show(line, keep=True):
    """Write a line to standard error; without keep, only in a terminal, to be overwritten."""
    in_terminal = hasattr(sys.stderr, "isatty") and sys.stderr.isatty()
    if keep or in_terminal:
        line = f"{line:79}" if in_terminal else line
        print(line, end="\n" if keep else "\r", file=sys.stderr, flush=True)


USAGE = """gpt.py train|sample [options]; add --help to either to see its options
       --data takes one file: join several with cat a.txt b.txt > c.txt
       a value that begins with - needs =, as in --prompt=-x
       in a notebook: gpt.main(["train", "--steps", "100"])"""


def make_parser():
    """The command line's parser. Its result holds only the options that were typed."""
    parser = argparse.ArgumentParser("gpt.py", usage=USAGE)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, options in (("train", TrainOptions), ("sample", SampleOptions)):
        command = commands.add_parser(name, prog="gpt.py", usage=USAGE, allow_abbrev=False)
        for item in fields(options):
            flag = "--" + item.name.replace("_", "-")
            action = argparse.BooleanOptionalAction if item.type is bool else "store"
            text = item.metadata["help"]
            if "choices" in item.metadata["limits"]:
                text += f" ({', '.join(item.metadata['limits']['choices'])})"
            if item.default not in (None, False):
                text += f" [{item.default}]"
            command.add_argument(flag, action=action, default=argparse.SUPPRESS, help=text)
    text = "continue the run in --out with its own options, except for those given"
    commands.choices["train"].add_argument("--resume", action="store_true", help=text)
    return parser


def main(argv=None):
    """Run a command. An error the user can fix ends with one line and SystemExit(2)."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # to UTF-8, whatever the system's code page
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    given = vars(make_parser().parse_args(argv))
    command = given.pop("command")
    try:
        if command == "sample":
            return sample(SampleOptions(**given))
        if given.pop("resume"):
            return resume(**given)
        return train(TrainOptions(**given))
    except BrokenPipeError:
        # The reader has gone, as with `| head`. Discard what Python has buffered.
        return os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        show("gpt.py: stopped")
        raise SystemExit(130)
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        message = " ".join(str(error).split()) or "out of memory"
        show(f"gpt.py: error: {message}")
        raise SystemExit(2)


# ==================================================================================================
# 9 Faster on a CPU
# You can delete this section and the two calls to its functions. Results differ only by rounding.
def speed_up_training():
    """Tell glibc, the C library, to keep large buffers instead of requesting them in each step. Let
    PyTorch multiply float32 matrices with oneDNN, its faster library, which may round to bfloat16.
    If multiplying by the identity matrix changes a number, oneDNN rounds: undo the setting."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # -4: M_MMAP_MAX in malloc.h
        libc.mallopt(-1, 2**31 - 1)  # -1: M_TRIM_THRESHOLD
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    x = torch.rand(512, 512)
    if not torch.equal(x @ torch.eye(512), x):
        products.fp32_precision = before


def speed_up_decoding(model):
    """Replace a model's matrix products on a CPU. Matrices may have 16 bits, but what flows between
    them is float32: CPUs are slow at 16-bit attention."""
    if model.token_embedding.device.type != "cpu":
        return
    model.position_embedding.data = model.position_embedding.data.float()
    for layer in model.modules():
        if isinstance(layer, LayerNorm):
            layer.float()
        if isinstance(layer, nn.Linear):
            if layer.weight.dtype != torch.float32:  # OpenAI's matrices lie column by column
                layer.weight.data = layer.weight.data.contiguous()
            layer.forward = functools.partial(multiply, layer.weight, layer.bias)
    model.head = functools.partial(multiply, model.token_embedding, 0.0)


def multiply(weight, bias, x):
    """x Wᵀ + b, (..., m) -> (..., n), in the way that is fastest on a CPU."""
    if x.numel() > x.shape[-1]:  # many tokens: in float32, converting W if needed
        return F.linear(x, weight.float()) + bias
    if weight.dtype != torch.float32:
        return F.linear(x.to(weight.dtype), weight).float() + bias
    # One token: reading W takes longest, often on one core. So each core gets a part of W.
    n, m = weight.shape
    cores = torch.get_num_threads()
    if weight.is_contiguous():  # row by row: each core makes a part of the n results
        size = n // cores
        parts = weight[: cores * size].view(cores, size, m).transpose(1, 2)
        y = torch.bmm(x.expand(cores, 1, m), parts).flatten()  # for each core, (1, m) @ (m, size)
        y = torch.cat([y, weight[cores * size :] @ x.flatten()])  # the rows left over
    else:  # column by column, as OpenAI's: each core multiplies by a part of x
        cores = math.gcd(cores, m)
        parts = weight.t().view(cores, m // cores, n)
        y = torch.bmm(x.view(cores, 1, -1), parts).sum(dim=0)  # (1, m / cores) @ (m / cores, n)
    return y.view(*x.shape[:-1], n) + bias


if __name__ == "__main__":
    main()
