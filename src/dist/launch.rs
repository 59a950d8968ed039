//! How a process was started.

use super::Ranks;
use crate::error::Result;

/// What launchers tell each process of how many there are: Open MPI; PMI of MPICH and Slurm; MVAPICH; Slurm.
const SIZES: [&str; 4] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"];

/// Returns how many processes a launcher such as `mpirun` has started together with this one, itself included; 1 if
/// there was none.
pub fn num_launched() -> usize {
    number_in(&SIZES)
}

/// What launchers tell each process of how many there are on its machine: Open MPI, MPICH, MVAPICH, Slurm.
const LOCAL_SIZES: [&str; 4] =
    ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"];

/// Returns how many processes a launcher has started on this machine together with this one, itself included, as far as
/// it says so; else 1.
pub fn num_on_machine() -> usize {
    number_in(&LOCAL_SIZES)
}

/// Returns the number in the first of these variables that has one, or 1.
fn number_in(names: &[&str]) -> usize {
    let number = |name: &&str| std::env::var(name).ok()?.parse::<usize>().ok();
    names.iter().find_map(number).unwrap_or(1).max(1)
}

#[cfg(feature = "mpi")]
pub(super) fn open() -> Result<Ranks> {
    match num_launched() {
        1 => Ok(Ranks::default()),
        _ => Ok(Ranks::over(std::sync::Arc::new(super::mpi::Mpi::open()?))),
    }
}

#[cfg(not(feature = "mpi"))]
pub(super) fn open() -> Result<Ranks> {
    use crate::error::{Error, missing_feature};
    match num_launched() {
        1 => Ok(Ranks::default()),
        num => Err(Error::Config(format!("one of {num} ranks: {}", missing_feature("mpi")))),
    }
}
