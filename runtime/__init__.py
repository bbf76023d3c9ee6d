"""What surrounds every run and is not the method: arguments, run folder, checkpoints, signals, progress, device.

A run folder holds

    config.json     algorithm, arguments, resolved environment id, commit, versions, hardware; whether the run is
                    finished; of every resume its first step, commit, versions and hardware
    scalars.csv     step, wall_s, name, value
    eval.csv        step, wall_s, episodes, return_mean, return_std, success_rate, length_mean
    checkpoint.pt   everything `--resume` needs, tensors and plain types only
    policy.pt2      the trained policy, observations -> actions, for any program that has torch
    encoder.pt2     of srl.py alone: pictures -> codes
    inner.pt2       the inner policy alone, of methods that fuse one with external policies
    algos-<algo>.py a copy of the script, taken at the start
    events...       TensorBoard
    video/          films and other pictures
"""
from errors import UserError
from runtime.args import checked, cli, hidden_layers, load_run
from runtime.device import can_compile, compile_for, compiled, finishing, pick_device, use_fast_matmul
from runtime.files import to_plain, write_whole
from runtime.policy import save_policy
from runtime.run import EVALUATION, Means, Run, exit_codes, restore

__all__ = ["EVALUATION", "Means", "Run", "UserError", "can_compile", "checked", "cli", "compile_for", "compiled",
           "exit_codes", "finishing", "hidden_layers", "load_run", "pick_device", "restore", "save_policy",
           "to_plain", "use_fast_matmul", "write_whole"]
