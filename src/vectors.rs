//! The vector instructions that the CPU's kernels use.

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};

use pulp::Arch;

use crate::error::{Error, Result};

/// Vector instructions, from the narrowest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Vectors {
    /// The instructions of every processor of the target, such as SSE2.
    Baseline,
    /// 256 bits with fused multiply-add: AVX2 and FMA; on ARM, NEON.
    Avx2,
    /// 512 bits: AVX-512 F, BW, CD, DQ and VL.
    Avx512,
}

impl Vectors {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Baseline, Self::Avx2, Self::Avx512];

    /// The name in the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// The widest that this machine has.
    pub fn of_machine() -> Self {
        kind(Arch::new())
    }
}

impl fmt::Display for Vectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The widest that kernels may use, by its place in [`Vectors::ALL`].
static WIDEST: AtomicU8 = AtomicU8::new(Vectors::Avx512 as u8);

/// Makes this process use no wider vectors than these, for comparisons and tests. Call it before any computation:
/// weights that were packed for inference before keep the layout of the vectors they were packed for. Products of
/// fully connected layers use at most AVX2 in any case.
///
/// # Errors
/// When this machine lacks them.
pub fn limit(vectors: Vectors) -> Result<()> {
    let widest = Vectors::of_machine();
    if vectors > widest {
        return Err(Error::Config(format!(
            "vectors: expected at most {widest}, the widest of this machine, found {vectors}"
        )));
    }
    WIDEST.store(vectors as u8, Ordering::Relaxed);
    Ok(())
}

/// Whether kernels may use these vectors; the machine may lack them all the same.
fn are_allowed(vectors: Vectors) -> bool {
    vectors as u8 <= WIDEST.load(Ordering::Relaxed)
}

/// Whether kernels may use AVX2, and the machine has it.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx2() -> bool {
    are_allowed(Vectors::Avx2) && is_x86_feature_detected!("avx2")
}

/// Whether kernels may use AVX-512 VNNI, and the machine has it.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_vnni() -> bool {
    let is_there = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni");
    are_allowed(Vectors::Avx512) && is_there
}

/// The instructions to dispatch kernels to.
pub(crate) fn arch() -> Arch {
    let arch = Arch::new();
    if are_allowed(kind(arch)) { arch } else { narrower() }
}

/// The widest that are allowed, on a machine with wider ones.
#[cfg(target_arch = "x86_64")]
fn narrower() -> Arch {
    match pulp::x86::V3::try_new().filter(|_| are_allowed(Vectors::Avx2)) {
        Some(v3) => Arch::V3(v3),
        None => Arch::Scalar,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn narrower() -> Arch {
    Arch::Scalar
}

fn kind(arch: Arch) -> Vectors {
    match arch {
        Arch::Scalar => Vectors::Baseline,
        #[cfg(target_arch = "x86_64")]
        Arch::V4(_) => Vectors::Avx512,
        #[allow(unreachable_patterns, reason = "a machine without vectors has no other kind")]
        _ => Vectors::Avx2,
    }
}
