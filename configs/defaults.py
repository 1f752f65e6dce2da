"""Every configuration key with its default: the one place where a key is declared.

A key that is not here does not exist: YAML files, --opts and flags are checked against this tree. A
default's type is the key's type; None and [] mean "not given", and the comment says what is used
instead."""

from yacs.config import CfgNode

from configs.config import Config

_C = Config()

# YAML files to read first, relative to the file that names them; later ones win, the file itself
# last
_C.BASE = [""]
# written by load_config: the keys that a file, --opts or a flag set (all others are defaults)
_C.EXPLICIT = []
_C.WORLD_SIZE = 1  # written by load_config: number of processes of this run

# Data
_C.DATA = CfgNode()
_C.DATA.BATCH_SIZE = 128  # images per process and forward pass
# folder (or the folder that holds train.tar and val.tar); may be empty for `shapes`
_C.DATA.DATA_PATH = ""
_C.DATA.VAL_PATH = ""  # validation images, when they are not beside the training images
# imagenet | imagenet22k | cifar10 | cifar100 | folder (no labels) | shapes |
# package.module:function
_C.DATA.DATASET = "imagenet"
# ids of class folders: imagenet1k | imagenet22k | a file, one class name a line; "" = sorted
# folders
_C.DATA.CLASS_LIST = ""
# fraction of each class to train on, in (0, 1]; a smaller one is contained in a larger one
_C.DATA.SUBSET = 1.0
_C.DATA.EXCLUDE = ""  # file of keys (one a line) to leave out of training
_C.DATA.INDEX_DIR = ""  # where the list of images is cached; "" = the user's cache folder
_C.DATA.REINDEX = False  # scan the data again even if the cached list looks fresh
_C.DATA.DOWNLOAD = False  # fetch cifar10 / cifar100 into DATA_PATH when they are missing
# base of all sample seeds and of the order of epochs; with a store both come from its manifest
_C.DATA.SEED = 0
# default (ImageNet's) | clip | half (0.5; also called inception)
_C.DATA.MEAN_AND_STD_TYPE = "default"
_C.DATA.MEAN = []  # three numbers that replace the type's mean
_C.DATA.STD = []  # three numbers that replace the type's standard deviation
_C.DATA.IMG_SIZE = 224  # pixels a side, from 32 up; a square
# bicubic | bilinear | random (training draws one of the two; evaluation uses bicubic)
_C.DATA.INTERPOLATION = "bicubic"
_C.DATA.PIN_MEMORY = True  # page-locked batches (used with CUDA alone)
_C.DATA.NUM_WORKERS = 8  # loader processes per training process
_C.DATA.WORKER_START = "auto"  # fork | spawn | forkserver; auto = the platform's default
_C.DATA.PREFETCH = 2  # batches each loader process prepares ahead
_C.DATA.FNAME_FORMAT = "{}.jpeg"  # imagenet22k: a listed name's file inside its zip
_C.DATA.DEBUG = False  # imagenet22k: only the classes n00007846*
# error | neighbour (the next readable image by position takes its place, with one warning)
_C.DATA.ON_CORRUPT = "error"
# an image with more pixels is an error (a decompression bomb, most likely)
_C.DATA.MAX_PIXELS = 178956970
_C.DATA.SHAPES = CfgNode()
_C.DATA.SHAPES.TRAIN_IMAGES = 5000  # images drawn for `shapes`
_C.DATA.SHAPES.VAL_IMAGES = 1000
_C.DATA.SHAPES.SIZE = 64  # pixels a side of the drawn images

# Model
_C.MODEL = CfgNode()
_C.MODEL.TYPE = "tiny_vit"  # tiny_vit | clip_vit_large14_224 | timm | package.module:function
_C.MODEL.NAME = "tiny_vit"  # names the run's folder; for TYPE timm the timm model to build
# weights to start from: a path, a URL, a zoo name (22kto1k_distill ...), for TYPE timm also `hub`
_C.MODEL.PRETRAINED = ""
# checkpoint to continue from (training), or to load exactly (--eval, --throughput, saving)
_C.MODEL.RESUME = ""
_C.MODEL.NUM_CLASSES = 0  # 0 = the store's, the teacher's or the data's
_C.MODEL.DROP_RATE = 0.0
_C.MODEL.DROP_PATH_RATE = 0.1
_C.MODEL.LABEL_SMOOTHING = 0.1  # labels only; stored logits are taken as they are
_C.MODEL.TINY_VIT = CfgNode()
_C.MODEL.TINY_VIT.IN_CHANS = 3
_C.MODEL.TINY_VIT.DEPTHS = [2, 2, 6, 2]
_C.MODEL.TINY_VIT.NUM_HEADS = [3, 6, 12, 18]
_C.MODEL.TINY_VIT.WINDOW_SIZES = [7, 7, 14, 7]
_C.MODEL.TINY_VIT.EMBED_DIMS = [96, 192, 384, 576]
_C.MODEL.TINY_VIT.MLP_RATIO = 4.0
_C.MODEL.TINY_VIT.MBCONV_EXPAND_RATIO = 4.0
_C.MODEL.TINY_VIT.LOCAL_CONV_SIZE = 3

# Distillation
_C.DISTILL = CfgNode()
# train on teacher probabilities; a TEACHER_LOGITS_PATH or ONLINE turns it on
_C.DISTILL.ENABLED = False
_C.DISTILL.TEACHER_LOGITS_PATH = ""  # the logits store
_C.DISTILL.SAVE_TEACHER_LOGITS = False  # set by save_logits.py
# 0 = when saving 100 beyond 1,000 classes, else 10 (at most the class count); when reading the
# store's
_C.DISTILL.LOGITS_TOPK = 0
# saving: probabilities are softmax(logits / T); a student takes T from the store
_C.DISTILL.TEMPERATURE = 1.0
# saving: file of class indices or names to which the teacher's outputs are cut and renormalised
_C.DISTILL.CLASS_SUBSET = ""
# loss = (1 - ALPHA) * cross entropy with labels + ALPHA * T^2 * cross entropy with the teacher
_C.DISTILL.ALPHA = 1.0
_C.DISTILL.HARD = False  # use the teacher's top-1 class as a hard target
# of K probabilities that sum to over 1: rescale | subtract (from other classes) | auto (as in the
# store)
_C.DISTILL.EXCESS = "auto"
# epoch e of a longer run is the store's epoch e modulo its number of epochs
_C.DISTILL.REUSE_EPOCHS = False
# local folder to which the next epoch of a slow store is copied in the background
_C.DISTILL.STAGE_DIR = ""
_C.DISTILL.OTHER_SIZE = False  # allow a student of another image size than the store's
_C.DISTILL.UPSTREAM_ORDER = "folder"  # order of positions in an original's store: folder | tar
_C.DISTILL.ONLINE = False  # run the teacher in the training loop instead of reading a store
_C.DISTILL.TEACHER_CFG = ""  # YAML file of the online teacher
_C.DISTILL.TEACHER_WEIGHTS = ""  # checkpoint of the online teacher

# Training
_C.TRAIN = CfgNode()
_C.TRAIN.START_EPOCH = 0
_C.TRAIN.EPOCHS = 300
_C.TRAIN.WARMUP_EPOCHS = 20
_C.TRAIN.WEIGHT_DECAY = 0.05
_C.TRAIN.BASE_LR = 5e-4  # this and the next two are scaled by (images per update) / 512
_C.TRAIN.WARMUP_LR = 5e-7
_C.TRAIN.MIN_LR = 5e-6
_C.TRAIN.CLIP_GRAD = 5.0  # largest gradient norm; 0 = no clipping
_C.TRAIN.AUTO_RESUME = True  # continue from the newest valid checkpoint of the run's folder
_C.TRAIN.ACCUMULATION_STEPS = 1  # forward passes per update
# images per update over all processes; > 0 sets accumulation from the world size
_C.TRAIN.GLOBAL_BATCH = 0
_C.TRAIN.USE_CHECKPOINT = False  # recompute activations in the backward pass to save memory
_C.TRAIN.LAYER_LR_DECAY = 1.0  # factor per block, from the head down
_C.TRAIN.EVAL_BN_WHEN_TRAINING = False  # batch norm keeps its running statistics
_C.TRAIN.FREEZE = ""  # "" | backbone (train the head alone)
# > 0 keeps an exponential moving average of the weights, which is then evaluated too
_C.TRAIN.EMA_DECAY = 0.0
_C.TRAIN.COMPILE = False  # torch.compile the model
_C.TRAIN.CHANNELS_LAST = True  # memory format of images and convolutions
_C.TRAIN.SYNC_BN = False  # batch statistics over all processes (CUDA)
# deterministic kernels: equal bits from run to run, at some cost in speed
_C.TRAIN.DETERMINISTIC = False
# also save within an epoch, this often; 0 = only at the end of epochs
_C.TRAIN.CHECKPOINT_MINUTES = 15.0
# stop after so many updates in a row with a non-finite loss or gradient
_C.TRAIN.MAX_BAD_STEPS = 10
_C.TRAIN.LR_SCHEDULER = CfgNode()
_C.TRAIN.LR_SCHEDULER.NAME = "cosine"  # cosine | linear | step
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30  # step: epochs between decays
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1  # step: factor per decay
_C.TRAIN.OPTIMIZER = CfgNode()
_C.TRAIN.OPTIMIZER.NAME = "adamw"  # adamw | sgd
_C.TRAIN.OPTIMIZER.EPS = 1e-8
_C.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9  # sgd (Nesterov)

# Augmentation
_C.AUG = CfgNode()
_C.AUG.COLOR_JITTER = 0.4  # used when AUTO_AUGMENT is none
# rand[-m9-n2-mstd0.5-mmax10-w0-inc1] | original[-mstd0.5] | v0[-mstd0.5] | none
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
_C.AUG.REPROB = 0.25  # probability of random erasing
_C.AUG.REMODE = "pixel"  # const | rand | pixel
_C.AUG.RECOUNT = 1  # largest number of erased boxes
_C.AUG.MIXUP = 0.8  # alpha of mixup; 0 = off
_C.AUG.CUTMIX = 1.0  # alpha of cutmix; 0 = off
_C.AUG.CUTMIX_MINMAX = None  # [min, max] side of the cutmix box as fractions; replaces CUTMIX
_C.AUG.MIXUP_PROB = 1.0
_C.AUG.MIXUP_SWITCH_PROB = 0.5  # probability of cutmix where both are on
_C.AUG.MIXUP_MODE = "batch"  # batch | pair2 (neighbours, from their seeds; forced when distilling)
_C.AUG.SCALE = (0.08, 1.0)  # area of the random crop, as fractions
_C.AUG.RATIO = (3 / 4, 4 / 3)  # aspect ratio of the random crop
_C.AUG.HFLIP = 0.5
_C.AUG.VFLIP = 0.0
_C.AUG.FILL = []  # RGB, 0..255, of pixels that geometric ops bring in; [] = round(255 * mean)

# Evaluation and the rest
_C.TEST = CfgNode()
# resize to 256/224 of the size and crop the centre; False = resize straight to the size
_C.TEST.CROP = True
_C.TEST.BATCH_SIZE = 0  # 0 = DATA.BATCH_SIZE
_C.TEST.EVERY = 1  # epochs between evaluations (the last epoch is always evaluated)
_C.TEST.PER_CLASS_CSV = ""  # --eval: write the accuracy of each class to this file

_C.AMP_ENABLE = True  # False wins over AMP_DTYPE
_C.AMP_DTYPE = "auto"  # auto (bf16 where the GPU has it, else fp16; off on CPU) | bf16 | fp16 | off
_C.DEVICE = "auto"  # auto (cuda, else cpu) | cuda | mps | cpu
_C.OUTPUT = "output"  # runs are written to OUTPUT/MODEL.NAME/TAG
_C.TAG = "default"
_C.SAVE_FREQ = 1  # keep the checkpoint of every so many epochs
_C.PRINT_FREQ = 10  # updates between log lines
_C.SEED = 0  # the student's own: initial weights, dropout, drop path
_C.EVAL_MODE = False  # --eval
_C.THROUGHPUT_MODE = False  # --throughput
_C.LOCAL_RANK = 0  # accepted and ignored: torchrun's environment says it
_C.USE_WANDB = False  # --use-wandb
_C.WANDB_PROJECT = "tinyvit"


def get_defaults() -> Config:
    """A fresh, unfrozen copy of the defaults."""
    return _C.clone()
