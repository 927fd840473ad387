"""The hand-set numbers of the default scheduler and of what it learns from.

None comes from the paper, whose schedulers need no more than costs and confidence. "Plain choice" marks a number that
was chosen for the reason given beside it and never tuned by itself; `benchmarks/replay.py` measures what all of them
come to together. Run it before and after a change.
"""

from __future__ import annotations

# --- whether to draft (adaptive/scheduler.py)
# Drafting must promise this many times the speed of plain decoding. Plain choice: about the error of a median cost.
REQUIRED_GAIN = 1.02
# While few drafting rounds were timed, less will do: doubt of this share, less with every round. Plain choice: one
# disturbed round must not decide.
DOUBT = 0.3
# Rounds that what a drafter has shown before weighs as much as. Plain choice: a handful of blocks outweigh it.
PRIOR_BLOCKS = 4
# Rounds between two plans. Plain choice: planning must not cost much.
PLAN_EVERY = 4
# Drafted rounds at the start that each get a plan of their own, and blocks that still count once drafting was given
# up. Plain choice: few enough for a handful of trials to change the verdict.
FEW_BLOCKS = 8
# Tokens of the first pass over drafts, over all rows; no later one is more than twice as wide as all before.
# Plain choice: most machines take 16 tokens at little more than the price of one (benchmarks/results, tables of
# costs).
FEW_TOKENS = 16
# Drafts per row in it. Plain choice: the smallest block that benchmarks/throughput.py measures.
FEW_DRAFTS = 3
# A round's time counts only up to this many times the usual one, up or down. Plain choice: five times the noise of 5%
# that benchmarks/replay.py assumes.
MOST_SURPRISE = 1.25

# --- when to give up drafting and when to try again (adaptive/parking.py)
# Parked rounds before the first trial. Plain choice: early trials cost about a sixteenth.
FIRST_TRIAL_GAP = 16
# Good offers that are passed over before one is looked up all the same, the first time. Plain choice: nearly half the
# drafts of a good offer are right, so a trial costs less than a drafter's.
FIRST_LOOKUP_GAP = 4
# Plain steps that what is expected of a call's rounds weighs as much as, beside what they give. Plain choice.
RATE_TRUST = 8.0
# Parked rounds between two trials at most. Plain choice: a trial loses about one plain step, and
# all of them stay below 2% of a long run.
LONGEST_TRIAL_GAP = 256
# Plain steps, and trials that pay, needed before they count. Plain choice: one may be luck, or disturbed.
TIMES_TO_BELIEVE = 2
# Drafted rounds before the first and all later comparisons with plain steps. Plain choice: the first says whether to
# draft at all, and a later one costs a fortieth of the time. One more after 16 rounds cost a first text of 64 tokens
# 3% of its speed, and helped no drafter (benchmarks/replay.py).
PLAIN_GAPS = (4, 64)
# Plain steps that drafting may lose before it is given up, with one row; with several, their share of it. Plain
# choice: the acceptance of a single row varies most, and lower limits were reached by bad luck.
MOST_LOSS = 12.0
# The least that this share may be, for large batches. Plain choice.
LEAST_LOSS = 2.0

# --- what recent blocks say (adaptive/memory.py, adaptive/planning.py)
# Blocks of single rows that count. Plain choice: enough to average over easy and hard places, few enough to follow the
# text.
NUM_RECENT_BLOCKS = 48
# Rounds that count however many rows they have. Plain choice.
FEWEST_ROUNDS = 4
# Chance of a draft before anything is known. Plain choice.
PRIOR_CHANCE = 0.7
# Steps towards the best rate. Plain choice: they converge in a few.
NUM_RATE_STEPS = 3
# Tokens that a level yields at least. Plain choice: any number that is not zero.
LEAST_GAIN = 1e-9

# --- what to look up where no costs are known (interface.py)
# Chance to be reached and accepted from which a looked-up draft is made. Plain choice: a further token costs a small
# part of a pass.
LEAST_SURVIVAL = 0.25

# --- what is assumed where the clock must not decide (counted.py)
# A token more in a pass costs this share of a plain pass, on CPUs in fp32 the other one. There a pass over several
# tokens costs so much more besides: vectors take other kernels than matrices. Plain choice: small targets showed 0.02
# to 0.03, and in fp32 passes over 2, 4 and 8 tokens took 1.1, 1.7 and 2.1 plain ones on one processor, 1.6, 1.5 and
# 1.6 on another.
ASSUMED_COST_OF_A_TOKEN = 0.03
ASSUMED_COST_OF_A_TOKEN_IN_FP32 = 0.07
ASSUMED_COST_OF_WIDTH_IN_FP32 = 0.3
# A drafted block does so, on CPUs the other one. Plain choice: small targets showed 0.27 on CPUs, and 0.4 with all
# that sampling adds; larger ones and GPUs take less.
ASSUMED_COST_OF_A_BLOCK = 0.2
ASSUMED_COST_OF_A_BLOCK_ON_CPUS = 0.3
# The least chance that a draft is believed to have. Plain choice: any small number, so that none is hopeless for good.
LEAST_CHANCE = 0.01
# Drafts of a place that weigh as much as the prior. Plain choice: a handful of blocks decide.
COUNT_TRUST = 4.0
# What a draft still weighs after another one. Plain choice: some thirty count, so that they follow the text.
COUNT_MEMORY = 0.97

# --- how sure a draft is (estimator.py, confidence.py)
# Margins above this one count as this one. Plain choice: the fit is sure of such drafts already.
MAX_MARGIN = 12.0
# Bias and slope of the fit before anything is known. Plain choice: a margin of 1.3 is even odds.
PRIOR_BIAS_AND_SLOPE = (-0.9, 0.7)
# How firmly they are believed: one over the variance. Plain choice.
PRIOR_PRECISION = 2.0
# Drafts that are fitted. Plain choice: few enough to follow the text.
NUM_FITTED_DRAFTS = 256
# New drafts between two fits; up to twice as many in all, every round is fitted. Plain choice.
FIT_EVERY = 32
# Newton steps of a fit. Plain choice: each fit starts from the last one.
NUM_FIT_STEPS = 4
# Most that one of them changes the log-odds. Plain choice: far from its goal, a Newton step goes too far.
LONGEST_FIT_STEP = 2.0
# Rounds without a verified draft after which a whole block is verified. Plain choice: costs below 2% of the rounds.
MOST_IDLE_ROUNDS = 64

# --- what steps cost (costs/online.py)
# Rounds of a shape whose median counts. Plain choice: many, so that only what they have in common stays.
NUM_SAMPLES = 127
# Rounds whose median is the machine's speed of the moment. Plain choice: as many as a slow moment lasts.
NUM_MOMENT = 7
# Samples of a shape that are taken although no plain step was made lately. Plain choice.
FEW_SAMPLES = 3
# Batches up to this many times larger or smaller count as known. Plain choice.
NEAR = 2
# Samples of a shape that weigh as much as what all shapes together say. Plain choice.
TRUST = 4.0
# Share of the drafter's time that depends neither on drafts nor on rows. Plain choice: its backbone runs over whole
# blocks, and rows share its weights.
FIXED_SHARE = 0.5
# What a token adds to a pass before anything is measured, as a share of a pass over none; how firmly that is believed,
# as samples one token from the mean; the drafter's share of a plain step. Plain choice: between what bf16 and fp32
# cost on the pages in benchmarks/results; a pass over one token and one over eight soon outweigh it.
PASS_TILT = 0.04
TILT_TRUST = 8.0
DRAFT_SHARE = 0.2
# No step takes less than this share of the quickest that was measured. Plain choice: lines must not lead below zero.
LEAST_SHARE = 0.1

# --- when drafts branch (adaptive/branching.py, adaptive/scheduler.py)
# Drafts of a tree that the drafter grows; with the anchor, a pass of 24. Plain choice: no larger tree has gained more
# (benchmarks/results/trees.md).
MOST_OF_TREE = 23
# How many of them are verified, rounded to one of these. Plain choice: costs of few widths are soon known.
TREE_LEVELS = (0, 1, 2, 3, 5, 7, 11, 15, 23)
# A tree must promise this many times the speed of a chain. Plain choice: about the error of both promises.
TREE_GAIN = 1.03
# Plain passes that one over a whole block may cost where drafts branch. Plain choice: a tree's pass is up to three
# times as wide, and where a block costs half a plain pass more (SmolLM2 in fp32) trees lost a quarter on texts that
# are hard to draft.
DEAREST_WIDTH = 1.25
# Trees that are drafted to see what they would give, before a plan counts, and chains where trees seem to give more.
# Plain choice: one may be luck.
FEW_TREES = 4
# Drafted rounds from one that shows what the other kind of drafts would give to the next. Plain choice: costs below
# 1%.
OTHER_KIND_EVERY = 32
# Probabilities at which paths begin to count together, and the paths of each band, by the drafter's own word, that are
# believed beforehand. Plain choice: a few dozen trees outweigh them.
CHANCE_BANDS = (0.03, 0.1, 0.25, 0.5)
CHANCE_TRUST = 4.0
# Chance of a draft of a tree whose drafter says nothing of it. Plain choice: what becomes of them puts it right.
UNKNOWN_CHANCE = 0.5
# What a path still weighs after another one. Plain choice: some hundred count, so that they follow the text.
CHANCE_MEMORY = 0.995
