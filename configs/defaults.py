"""Every configuration key with its default: the one place where a key is declared.

A key that is not here does not exist: YAML files, --opts and flags are checked against this tree.
A default's type is the key's type; None and [] mean "not given", and the comment says what is used
instead.
"""

from yacs.config import CfgNode

from configs.config import Config

# Keys of earlier versions: a file that still has one is read without it.
REMOVED = {
    "DISTILL.STAGE_DIR": "copy a store from a slow file system to a local disk before training",
}

_C = Config()

# YAML files to read first, relative to the one that names them; later ones win, its own keys most
_C.BASE = [""]
# written by load_config: the keys that a file, --opts or a flag set (all others are defaults)
_C.EXPLICIT = []
# written by load_config: processes of this run
_C.WORLD_SIZE = 1

# Data

_C.DATA = CfgNode()
# images per process and forward pass
_C.DATA.BATCH_SIZE = 128
# folder (or the folder that holds train.tar and val.tar); may be empty for `shapes`
_C.DATA.DATA_PATH = ""
# validation images, when they are not beside the training images
_C.DATA.VAL_PATH = ""
# imagenet | imagenet22k | cifar10 | cifar100 | folder (no labels) | webdataset | parquet | shapes |
# module:function
_C.DATA.DATASET = "imagenet"
# ids of class folders: imagenet1k | imagenet22k | a file of class names, one a line; "" = sorted
_C.DATA.CLASS_LIST = ""
# fraction of each class to train on, in (0, 1], an image at least; a smaller one is in a larger one
_C.DATA.SUBSET = 1.0
# fraction of each class that is not trained on but evaluated on, in place of validation images;
# rounded up, but an image at least is trained on
_C.DATA.HELD_OUT = 0.0
# file of keys (one a line) to leave out of training
_C.DATA.EXCLUDE = ""
# where the list of images is cached; "" = the user's cache folder
_C.DATA.INDEX_DIR = ""
# scan the data again even if the cached list looks fresh
_C.DATA.REINDEX = False
# parquet: the column whose text names an image; "" = the path beside it
_C.DATA.KEY_COLUMN = ""
# fetch cifar10 / cifar100 into DATA_PATH when they are missing
_C.DATA.DOWNLOAD = False
# base of all sample seeds and of the order of epochs; with a store both come from its manifest
_C.DATA.SEED = 0
# default (ImageNet's) | clip | half (0.5; also called inception)
_C.DATA.MEAN_AND_STD_TYPE = "default"
# three numbers that replace the type's mean
_C.DATA.MEAN = []
# three numbers that replace the type's standard deviation
_C.DATA.STD = []
# pixels a side of the square that a model sees, from 32 to 4096
_C.DATA.IMG_SIZE = 224
# bicubic | bilinear | random (training draws one of the two; evaluation uses bicubic)
_C.DATA.INTERPOLATION = "bicubic"
# page-locked batches (used with CUDA alone)
_C.DATA.PIN_MEMORY = True
# loader processes per training process; -1 = its share of the cores but one, 16 at most
_C.DATA.NUM_WORKERS = -1
# fork | spawn | forkserver; auto = the platform's default
_C.DATA.WORKER_START = "auto"
# batches that each loader process prepares ahead
_C.DATA.PREFETCH = 2
# imagenet22k: a listed name's file inside its zip
_C.DATA.FNAME_FORMAT = "{}.jpeg"
# imagenet22k: only the classes n00007846*
_C.DATA.DEBUG = False
# error | neighbour (the next readable image by position takes its place, with one warning)
_C.DATA.ON_CORRUPT = "error"
# an image with more pixels is an error (a decompression bomb, most likely)
_C.DATA.MAX_PIXELS = 178956970

# `shapes`: images that are drawn
_C.DATA.SHAPES = CfgNode()
# training images
_C.DATA.SHAPES.TRAIN_IMAGES = 5000
# validation images
_C.DATA.SHAPES.VAL_IMAGES = 1000
# pixels a side
_C.DATA.SHAPES.SIZE = 64

# Model

_C.MODEL = CfgNode()
# tiny_vit | clip_vit_large14_224 | timm | package.module:function
_C.MODEL.TYPE = "tiny_vit"
# names the run's folder; for TYPE timm the timm model to build
_C.MODEL.NAME = "tiny_vit"
# TYPE timm: arguments of the model, e.g. {img_size: 32, patch_size: 4}
_C.MODEL.ARGS = ""
# weights to start from: a path, a URL, a zoo name (22kto1k_distill ...), hf-hub:user/repository,
# or `hub`, which for TYPE tiny_vit and timm is what timm has published for the model;
# with @sha256=... and at least 8 digits behind it (and so RESUME, TEACHER_WEIGHTS) that file alone
_C.MODEL.PRETRAINED = ""
# checkpoint to continue from (training), or to load exactly (--eval, --throughput, saving)
_C.MODEL.RESUME = ""
# 0 = the store's, the teacher's or the data's
_C.MODEL.NUM_CLASSES = 0
# dropout before the classifier
_C.MODEL.DROP_RATE = 0.0
# stochastic depth: probability that the last block is skipped, linearly less before it
_C.MODEL.DROP_PATH_RATE = 0.1
# of labels only; stored logits are taken as they are
_C.MODEL.LABEL_SMOOTHING = 0.1

# TYPE tiny_vit: lists have an entry a stage
_C.MODEL.TINY_VIT = CfgNode()
# colour channels of an image
_C.MODEL.TINY_VIT.IN_CHANS = 3
# blocks
_C.MODEL.TINY_VIT.DEPTHS = [2, 2, 6, 2]
# attention heads; each divides its EMBED_DIMS (stage 0 is convolutional)
_C.MODEL.TINY_VIT.NUM_HEADS = [3, 6, 12, 18]
# positions a side of an attention window
_C.MODEL.TINY_VIT.WINDOW_SIZES = [7, 7, 14, 7]
# channels
_C.MODEL.TINY_VIT.EMBED_DIMS = [96, 192, 384, 576]
# hidden channels of an MLP / its channels
_C.MODEL.TINY_VIT.MLP_RATIO = 4.0
# hidden channels of a block of stage 0 / its channels
_C.MODEL.TINY_VIT.MBCONV_EXPAND_RATIO = 4.0
# positions a side of the depthwise convolution between attention and MLP, odd
_C.MODEL.TINY_VIT.LOCAL_CONV_SIZE = 3

# Distillation

_C.DISTILL = CfgNode()
# train on teacher probabilities; a TEACHER_LOGITS_PATH or ONLINE turns it on
_C.DISTILL.ENABLED = False
# the logits store
_C.DISTILL.TEACHER_LOGITS_PATH = ""
# no setting of a user's but the mode of the program, as in the original: save_logits.py sets it
_C.DISTILL.SAVE_TEACHER_LOGITS = False
# 0 = when saving 10, or 100 beyond 1,000 classes (data.build.default_topk); reading: the store's
_C.DISTILL.LOGITS_TOPK = 0
# saving: probabilities are softmax(logits / T); a student takes T from the store
_C.DISTILL.TEMPERATURE = 1.0
# saving: file of class indices or names to which the teacher's outputs are cut and renormalised
_C.DISTILL.CLASS_SUBSET = ""
# loss = (1 - ALPHA) * cross entropy with labels + ALPHA * T^2 * cross entropy with the teacher
_C.DISTILL.ALPHA = 1.0
# use the teacher's top-1 class as a hard target
_C.DISTILL.HARD = False
# a student with two heads (timm's distilled models): the class head learns from labels, with
# 1 - ALPHA of the loss, the distillation head from the teacher
_C.DISTILL.TWO_HEADS = False
# of K probabilities summing to over 1: rescale | subtract (from other classes) | auto (the store's)
_C.DISTILL.EXCESS = "auto"
# epoch e of a longer run is the store's epoch e modulo its number of epochs
_C.DISTILL.REUSE_EPOCHS = False
# > 0: the same, as if the store had its first so many epochs alone
_C.DISTILL.REUSE_FIRST = 0
# compare each epoch of a store with its checksums before it is read (once a machine)
_C.DISTILL.VERIFY = True
# allow a student of another image size than the store's
_C.DISTILL.OTHER_SIZE = False
# order of positions in an original's store: folder | tar
_C.DISTILL.UPSTREAM_ORDER = "folder"
# run the teacher in the training loop instead of reading a store
_C.DISTILL.ONLINE = False
# YAML file of the online teacher
_C.DISTILL.TEACHER_CFG = ""
# checkpoint of the online teacher
_C.DISTILL.TEACHER_WEIGHTS = ""

# Training

_C.TRAIN = CfgNode()
# first epoch of a run that begins anew
_C.TRAIN.START_EPOCH = 0
# epochs in all, warm-up included
_C.TRAIN.EPOCHS = 300
# epochs in which the learning rate rises
_C.TRAIN.WARMUP_EPOCHS = 20
# of matrices; biases and normalisation do not decay
_C.TRAIN.WEIGHT_DECAY = 0.05
# highest learning rate; this and the next two are scaled by (images per update) / 512
_C.TRAIN.BASE_LR = 5e-4
# learning rate that the warm-up begins with
_C.TRAIN.WARMUP_LR = 5e-7
# learning rate that the cosine ends with
_C.TRAIN.MIN_LR = 5e-6
# largest gradient norm; 0 = no clipping
_C.TRAIN.CLIP_GRAD = 5.0
# continue from the newest valid checkpoint of the run's folder
_C.TRAIN.AUTO_RESUME = True
# forward passes per update
_C.TRAIN.ACCUMULATION_STEPS = 1
# images per update over all processes; > 0 sets accumulation from the world size
_C.TRAIN.GLOBAL_BATCH = 0
# recompute activations in the backward pass to save memory
_C.TRAIN.USE_CHECKPOINT = False
# factor of the learning rate per block, from the head down
_C.TRAIN.LAYER_LR_DECAY = 1.0
# batch norm keeps its running statistics
_C.TRAIN.EVAL_BN_WHEN_TRAINING = False
# "" | backbone (train the head alone)
_C.TRAIN.FREEZE = ""
# > 0 keeps an exponential moving average (EMA) of the weights, which is then evaluated too
_C.TRAIN.EMA_DECAY = 0.0
# torch.compile the model: True | False | auto (runs of 2,000 updates and more on CUDA, not with
# DETERMINISTIC); a teacher only where it is True
_C.TRAIN.COMPILE = "auto"
# memory format of images and convolutions
_C.TRAIN.CHANNELS_LAST = True
# batch statistics over all processes (CUDA)
_C.TRAIN.SYNC_BN = False
# deterministic kernels: equal bits from run to run, at some cost in speed
_C.TRAIN.DETERMINISTIC = False
# also save within an epoch, this often; 0 = only at the end of epochs
_C.TRAIN.CHECKPOINT_MINUTES = 15.0
# of the checkpoints that SAVE_FREQ keeps the newest so many stay; 0 = all
_C.TRAIN.KEEP_CHECKPOINTS = 0
# stop after so many updates in a row with a non-finite loss or gradient
_C.TRAIN.MAX_BAD_STEPS = 10

_C.TRAIN.LR_SCHEDULER = CfgNode()
# cosine | linear | step
_C.TRAIN.LR_SCHEDULER.NAME = "cosine"
# step: epochs between decays
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30
# step: factor per decay
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1

_C.TRAIN.OPTIMIZER = CfgNode()
# adamw | sgd
_C.TRAIN.OPTIMIZER.NAME = "adamw"
# adamw: added to the denominator
_C.TRAIN.OPTIMIZER.EPS = 1e-8
# adamw: decay of the averages of gradients and of their squares
_C.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)
# sgd (Nesterov)
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9

# Augmentation

_C.AUG = CfgNode()
# brightness, contrast and saturation change by up to this; used when AUTO_AUGMENT is none
_C.AUG.COLOR_JITTER = 0.4
# rand[-m9-n2-mstd0.5-mmax10-w0-inc1] | original[-mstd0.5] | v0[-mstd0.5] | none
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
# probability of random erasing
_C.AUG.REPROB = 0.25
# const | rand | pixel
_C.AUG.REMODE = "pixel"
# largest number of erased boxes
_C.AUG.RECOUNT = 1
# alpha of mixup; 0 = off
_C.AUG.MIXUP = 0.8
# alpha of cutmix; 0 = off
_C.AUG.CUTMIX = 1.0
# [min, max] side of the cutmix box as fractions; replaces CUTMIX
_C.AUG.CUTMIX_MINMAX = None
# probability that images are mixed at all
_C.AUG.MIXUP_PROB = 1.0
# probability of cutmix where both are on
_C.AUG.MIXUP_SWITCH_PROB = 0.5
# batch | pair2 (neighbours, from their seeds; what distilling needs and takes by itself)
_C.AUG.MIXUP_MODE = "batch"
# area of the random crop, as fractions
_C.AUG.SCALE = (0.08, 1.0)
# aspect ratio of the random crop
_C.AUG.RATIO = (3 / 4, 4 / 3)
# probability of a horizontal flip
_C.AUG.HFLIP = 0.5
# probability of a vertical flip
_C.AUG.VFLIP = 0.0
# RGB, 0..255, of pixels that geometric ops bring in; [] = round(255 * mean)
_C.AUG.FILL = []
# what makes the pixels, with equal bits: pillow (in the loader's processes) | device (in batches,
# where the model is) | auto (device on CUDA, where a proof at the start passes)
_C.AUG.EXECUTOR = "auto"

# Evaluation

_C.TEST = CfgNode()
# resize to 256/224 of the size and crop the centre; False = resize straight to the size
_C.TEST.CROP = True
# 0 = DATA.BATCH_SIZE
_C.TEST.BATCH_SIZE = 0
# epochs between evaluations (the last epoch is always evaluated)
_C.TEST.EVERY = 1
# --eval: write the accuracy of each class to this file
_C.TEST.PER_CLASS_CSV = ""

# The program

# mixed precision; False wins over AMP_DTYPE
_C.AMP_ENABLE = True
# auto (bf16 where the GPU has it, else fp16; off on CPU) | bf16 | fp16 | off
_C.AMP_DTYPE = "auto"
# auto (cuda, else cpu) | cuda | mps | cpu
_C.DEVICE = "auto"
# runs are written to OUTPUT/MODEL.NAME/TAG
_C.OUTPUT = "output"
# name of the run
_C.TAG = "default"
# keep the checkpoint of every so many epochs
_C.SAVE_FREQ = 1
# updates between log lines
_C.PRINT_FREQ = 10
# the student's own: initial weights, dropout, drop path
_C.SEED = 0
# evaluate, then stop
_C.EVAL_MODE = False
# measure the model's speed, then stop
_C.THROUGHPUT_MODE = False
# accepted and ignored: torchrun's environment says it
_C.LOCAL_RANK = 0
# also log to Weights & Biases
_C.USE_WANDB = False
# project there
_C.WANDB_PROJECT = "tinyvit"


def get_defaults() -> Config:
    """A fresh, unfrozen copy of the defaults."""
    return _C.clone()
