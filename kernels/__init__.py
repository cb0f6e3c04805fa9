"""Expert computation of MoE layers: back ends for CPUs and GPUs behind `kernels.expert_mlp`."""
