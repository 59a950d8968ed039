//! What launchers such as `mpirun` tell the processes that they start.

/// What launchers tell each process of how many there are: Open MPI; PMI of MPICH and Slurm; MVAPICH; Slurm.
const SIZES: [&str; 4] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"];

/// Returns how many processes a launcher such as `mpirun` has started together with this one, itself included; 1 if
/// there was none.
pub(super) fn num_launched() -> usize {
    number_in(&SIZES).unwrap_or(1).max(1)
}

/// What launchers tell each process of how many there are on its machine: Open MPI, MPICH, MVAPICH, Slurm.
const LOCAL_SIZES: [&str; 4] =
    ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"];

/// Returns how many processes a launcher has started on this machine together with this one, itself included, as far as
/// it says so; else 1.
pub(super) fn num_on_machine() -> usize {
    number_in(&LOCAL_SIZES).unwrap_or(1).max(1)
}

/// What launchers tell each process of its number on its machine: Open MPI, MPICH, MVAPICH, Slurm.
const LOCAL_RANKS: [&str; 4] =
    ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"];

/// Returns the number of this process among those that a launcher has started on this machine, from 0, as far as it says
/// so; else 0.
pub(super) fn rank_on_machine() -> usize {
    number_in(&LOCAL_RANKS).unwrap_or(0)
}

/// Returns the number in the first of these variables that has one.
fn number_in(names: &[&str]) -> Option<usize> {
    names.iter().find_map(|name| std::env::var(name).ok()?.parse().ok())
}
