//! The machine that networks run on: the CPU or a GPU.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use crate::dist::Ranks;
use crate::ops::backend::Kernels;
use crate::ops::cpu::Cpu;

#[cfg(feature = "cuda")]
#[doc(hidden)]
pub mod bench;
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub mod dry;

#[cfg(any(test, feature = "cuda"))]
use crate::gpu;
#[cfg(test)]
pub(crate) use crate::gpu::tests::rounds_gradients;

/// The requested machine: `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The first GPU if this build supports it and it is usable, else the CPU.
    Auto,
    /// The CPU.
    #[default]
    Cpu,
    /// An NVIDIA GPU, by its number.
    Cuda(usize),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => match text.strip_prefix("cuda:").and_then(|number| number.parse().ok()) {
                Some(number) => Ok(Self::Cuda(number)),
                None => Err(format!("expected auto, cpu, cuda or cuda:N, found {text:?}")),
            },
        }
    }
}

impl Choice {
    /// Returns the machine of the process with this number among several on one machine: they take GPUs one after the
    /// other, from the chosen one on. [`Self::Auto`] is the GPU of this number, if there is any GPU.
    #[must_use]
    pub fn of_rank(self, rank: usize) -> Self {
        match self {
            Self::Cuda(first) => Self::Cuda(first + rank),
            Self::Auto if rank > 0 && has_gpu() => Self::Cuda(rank),
            other => other,
        }
    }
}

#[cfg(feature = "cuda")]
fn has_gpu() -> bool {
    gpu::Cuda::count().is_ok_and(|num| num > 0)
}

#[cfg(not(feature = "cuda"))]
fn has_gpu() -> bool {
    false
}

/// Precision of products on a GPU. Sums and parameters are f32 in all of them. The CPU computes in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 8 bits of mantissa, f32's range: for training.
    Bf16,
    /// 11 bits of mantissa, small range: for inference.
    F16,
    /// f32, but products round their factors to 11 bits of mantissa.
    Tf32,
    /// f32 throughout.
    F32,
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "bf16" => Ok(Self::Bf16),
            "f16" => Ok(Self::F16),
            "tf32" => Ok(Self::Tf32),
            "f32" => Ok(Self::F32),
            _ => Err(format!("expected bf16, f16, tf32 or f32, found {text:?}")),
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Tf32 => "tf32",
            Self::F32 => "f32",
        })
    }
}

/// A machine that runs networks. The default is the CPU.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    #[cfg(any(test, feature = "cuda"))]
    gpu: Option<Gpu>,
    /// Shared by the machine's clones.
    notices: Arc<Mutex<Vec<String>>>,
    /// Ranks that share its work.
    ranks: Ranks,
}

/// An open GPU.
#[cfg(any(test, feature = "cuda"))]
#[derive(Clone, Debug)]
pub(crate) struct Gpu {
    pub device: gpu::Device,
    pub precision: Precision,
    /// Display name.
    pub name: String,
}

#[cfg(any(test, feature = "cuda"))]
impl Gpu {
    /// The GPU with the element type of activations and of the products' factors.
    pub fn backend(&self) -> gpu::GpuBackend {
        let element = match self.precision {
            Precision::Bf16 => gpu::Element::Bf16,
            Precision::F16 => gpu::Element::F16,
            Precision::Tf32 | Precision::F32 => gpu::Element::F32,
        };
        gpu::GpuBackend { device: self.device.clone(), element }
    }
}

/// Work that runs on any device.
pub(crate) trait Work {
    /// What it returns.
    type Output;

    /// Does the work.
    fn on<B: Kernels>(self, backend: &B) -> Self::Output;
}

impl Machine {
    /// Does work on the machine's device.
    pub(crate) fn run<W: Work>(&self, work: W) -> W::Output {
        #[cfg(any(test, feature = "cuda"))]
        if let Some(gpu) = &self.gpu {
            return work.on(&gpu.backend());
        }
        work.on(&Cpu)
    }

    /// Opens the requested machine. [`Choice::Auto`] takes the first GPU that is usable; in a build with the GPU engine
    /// where none is, [`Self::take_notices`] says why.
    ///
    /// # Errors
    /// When a GPU is requested that this build does not support or that is not usable; the message is one line that
    /// says what is missing.
    pub fn open(choice: Choice, precision: Precision) -> crate::Result<Self> {
        match choice {
            Choice::Cpu => Ok(Self::default()),
            Choice::Cuda(number) => Self::cuda(number, precision),
            Choice::Auto => Ok(Self::auto(precision)),
        }
    }

    #[cfg(feature = "cuda")]
    fn auto(precision: Precision) -> Self {
        let on_cpu = |error: &dyn fmt::Display| Self::default().with_notice(format!("on the CPU: {error}"));
        let num = match gpu::Cuda::count() {
            Ok(0) => return on_cpu(&"this machine has no GPU"),
            Ok(num) => num,
            Err(error) => return on_cpu(&error),
        };
        let mut first = None;
        for number in 0..num {
            match (Self::cuda(number, precision), &first) {
                (Ok(machine), None) => return machine,
                (Ok(machine), Some(error)) => return machine.with_notice(format!("on GPU {number}: {error}")),
                (Err(error), _) => first = first.or(Some(error)),
            }
        }
        first.map_or_else(Self::default, |error| on_cpu(&error))
    }

    /// Without the GPU engine there is nothing to look for, and nothing to say each time.
    #[cfg(not(feature = "cuda"))]
    fn auto(_precision: Precision) -> Self {
        Self::default()
    }

    #[cfg(feature = "cuda")]
    fn with_notice(self, notice: String) -> Self {
        self.notices.lock().unwrap_or_else(PoisonError::into_inner).push(notice);
        self
    }

    /// Returns the machine with other ranks to share its work.
    #[must_use]
    pub fn with_ranks(self, ranks: &Ranks) -> Self {
        Self { ranks: ranks.clone(), ..self }
    }

    /// Ranks that share its work: trainings and evaluations on it run on all of them.
    pub fn ranks(&self) -> &Ranks {
        &self.ranks
    }

    /// Checks that its ranks run the same program with the same settings on the same kind of device.
    ///
    /// # Errors
    /// [`crate::Error::Ranks`], which names the first rank that differs, or says that one does not answer.
    pub(crate) fn agree(&self, settings: &str) -> crate::Result<()> {
        self.ranks.agree("build", concat!(env!("CARGO_PKG_VERSION"), " ", env!("MASKINV_COMMIT")))?;
        self.ranks.agree("settings", settings)?;
        let device = if self.is_cpu() { "CPU" } else { "GPU" };
        self.ranks.agree("kind of device", &format!("{device}, {}", self.precision()))
    }

    /// Returns what is worth saying and was not said yet, by this machine or a clone of it, such as that convolutions
    /// run a slower way.
    pub fn take_notices(&self) -> Vec<String> {
        let notices = std::mem::take(&mut *self.notices.lock().unwrap_or_else(PoisonError::into_inner));
        #[cfg(any(test, feature = "cuda"))]
        let notices =
            notices.into_iter().chain(self.gpu.iter().flat_map(|gpu| gpu.device.gpu().take_notices())).collect();
        notices
    }

    /// Whether networks run on the CPU.
    pub fn is_cpu(&self) -> bool {
        #[cfg(any(test, feature = "cuda"))]
        return self.gpu.is_none();
        #[cfg(not(any(test, feature = "cuda")))]
        true
    }

    /// Titles and values that say what this machine is and which libraries it uses; none for the CPU.
    pub fn facts(&self) -> Vec<(&'static str, String)> {
        #[cfg(any(test, feature = "cuda"))]
        if let Some(gpu) = &self.gpu {
            return gpu.device.gpu().facts();
        }
        Vec::new()
    }

    #[cfg(feature = "cuda")]
    fn cuda(number: usize, precision: Precision) -> crate::Result<Self> {
        let factors = if precision == Precision::Tf32 { gpu::Factors::Tf32 } else { gpu::Factors::Exact };
        let cuda = gpu::Cuda::new(number, factors)?;
        let name = format!("cuda:{number}, {}, {precision}", cuda.describe()?);
        Ok(Self { gpu: Some(Gpu { device: gpu::Device::new(Box::new(cuda)), precision, name }), ..Self::default() })
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda(_number: usize, _precision: Precision) -> crate::Result<Self> {
        let what = crate::error::missing_feature("cudnn");
        Err(crate::Error::Config(what))
    }

    /// Name of the precision of products: `f32` on the CPU.
    pub fn precision(&self) -> String {
        #[cfg(any(test, feature = "cuda"))]
        if let Some(gpu) = &self.gpu {
            return gpu.precision.to_string();
        }
        Precision::F32.to_string()
    }

    /// Bytes of GPU memory held, in use or pooled for reuse; none on the CPU. The pool is freed when memory runs out.
    pub fn gpu_bytes(&self) -> Option<usize> {
        #[cfg(any(test, feature = "cuda"))]
        return self.gpu.as_ref().map(|gpu| gpu.device.num_bytes());
        #[cfg(not(any(test, feature = "cuda")))]
        None
    }

    /// The machine of the tests: GPU kernels on the CPU, or a GPU (`gpu/tests.rs`).
    #[cfg(test)]
    pub(crate) fn of_tests(precision: Precision) -> Self {
        Self::of_tests_on_rank(precision, 0)
    }

    /// The machine of one of several ranks in the tests.
    #[cfg(test)]
    pub(crate) fn of_tests_on_rank(precision: Precision, rank: usize) -> Self {
        let device = gpu::tests::device_of_rank(rank);
        Self { gpu: Some(Gpu { device, precision, name: "tests".into() }), ..Self::default() }
    }

    #[cfg(feature = "cuda")]
    fn gpu(&self) -> Option<&Gpu> {
        self.gpu.as_ref()
    }
}

/// Returns the peak resident memory of this process in bytes; none where the system does not report it.
pub fn peak_bytes() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<usize>().ok()? * 1024)
}

/// Prints `cpu`, or the GPU's number, name, memory and precision; and the number of ranks if there are several.
impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        #[cfg(any(test, feature = "cuda"))]
        let device = self.gpu.as_ref().map_or("cpu", |gpu| &gpu.name);
        #[cfg(not(any(test, feature = "cuda")))]
        let device = "cpu";
        match self.ranks.size() {
            1 => f.write_str(device),
            num => write!(f, "{num} ranks, {device}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_and_precisions_are_read_or_refused() {
        let read = |text: &str| text.parse::<Choice>();
        assert_eq!(read("cuda:3"), Ok(Choice::Cuda(3)));
        assert_eq!([read("auto"), read("cpu"), read("cuda")], [Choice::Auto, Choice::Cpu, Choice::Cuda(0)].map(Ok));
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cuda:-1"] {
            assert!(read(wrong).is_err_and(|e| e.contains("expected auto, cpu, cuda or cuda:N")), "{wrong}");
        }
        for precision in [Precision::Bf16, Precision::F16, Precision::Tf32, Precision::F32] {
            assert_eq!(precision.to_string().parse(), Ok(precision));
        }
        assert!("fp8".parse::<Precision>().is_err());
        assert_eq!([Choice::Cpu, Choice::Cuda(4)].map(|choice| choice.of_rank(2)), [Choice::Cpu, Choice::Cuda(6)]);
        assert_eq!(Choice::Auto.of_rank(0), Choice::Auto);
    }

    #[test]
    fn auto_falls_back_to_the_cpu_and_says_why() -> crate::Result<()> {
        let machine = Machine::open(Choice::Auto, Precision::Tf32)?;
        if machine.to_string() == "cpu" {
            // In a build without the GPU engine there is no reason to give.
            assert_eq!(machine.take_notices().len(), usize::from(cfg!(feature = "cuda")));
        }
        let asked = Machine::open(Choice::Cuda(4096), Precision::Tf32).err().map(|e| e.to_string());
        // Below it candle's errors print the calls, if that is asked for.
        let is_traced = std::env::var_os("RUST_BACKTRACE").is_some();
        assert!(asked.is_some_and(|error| is_traced || !error.contains('\n')));
        Ok(())
    }
}
