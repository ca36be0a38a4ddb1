"""What the lessons share. A map, with the lesson that introduces each module.

settings        00  every choice that a learner can make
cluster         00  start or join Ray, and ask what it has
preflight       00  is this machine ready?
data            01  images to Parquet, and back to a Ray Dataset
plots           01  plots and rows of images
preprocessing   02  augment, normalise, channel statistics, image ids
model           03  the ResNet-18
training        03  the loop that every worker runs, and its checkpoint
data_config     04  which images each worker reads, and which are left after a failure
trainer         04  the parts of the TorchTrainer, and the trainer
progress        05  one line per epoch while `fit()` runs
evaluation      05  the checkpoint loaded back, and its test accuracy kept
faults          07  a step log, workers killed on purpose, a short run
mid_epoch       08  checkpoints inside an epoch, each image once
nodes           09  several Ray nodes on one machine
tuning          13  what a search prints and keeps
_sources            where images come from: digits, CIFAR-10, folders
_ray_internals      everything undocumented in Ray
"""
