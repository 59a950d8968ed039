//! The machine that networks run on: the CPU or a GPU.

use std::fmt;
use std::str::FromStr;

#[cfg(feature = "cuda")]
#[doc(hidden)]
pub mod bench;
#[cfg(feature = "cuda")]
#[doc(hidden)]
pub mod dry;

#[cfg(any(test, feature = "cuda"))]
use crate::gpu;

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

/// Precision of products on a GPU. Sums and parameters are f32 in all of them. The CPU computes in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// 8 bits of mantissa, f32's range.
    #[default]
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
    /// Element type of activations and of the products' inputs.
    pub fn element(&self) -> gpu::Element {
        match self.precision {
            Precision::Bf16 => gpu::Element::Bf16,
            Precision::F16 => gpu::Element::F16,
            Precision::Tf32 | Precision::F32 => gpu::Element::F32,
        }
    }
}

impl Machine {
    /// Opens the requested machine. If [`Choice::Auto`] falls back to the CPU in a build with the GPU engine, also
    /// returns the reason.
    ///
    /// # Errors
    /// When a GPU is requested that this build does not support or that is not usable; the message is one line that
    /// says what is missing.
    pub fn open(choice: Choice, precision: Precision) -> crate::Result<(Self, Option<String>)> {
        match choice {
            Choice::Cpu => Ok((Self::default(), None)),
            Choice::Cuda(number) => Ok((Self::cuda(number, precision)?, None)),
            Choice::Auto => match Self::cuda(0, precision) {
                Ok(machine) => Ok((machine, None)),
                // A build without the GPU engine need not say so each time.
                Err(_) if !cfg!(feature = "cuda") => Ok((Self::default(), None)),
                Err(error) => Ok((Self::default(), Some(format!("on the CPU: {error}")))),
            },
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda(number: usize, precision: Precision) -> crate::Result<Self> {
        let factors = if precision == Precision::Tf32 { gpu::Factors::Tf32 } else { gpu::Factors::Exact };
        let cuda = gpu::Cuda::new(number, factors)?;
        let name = format!("cuda:{number}, {}, {precision}", cuda.describe()?);
        Ok(Self { gpu: Some(Gpu { device: gpu::Device::new(Box::new(cuda)), precision, name }) })
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
        Self { gpu: Some(Gpu { device: gpu::tests::device(), precision, name: "tests".into() }) }
    }

    #[cfg(any(test, feature = "cuda"))]
    pub(crate) fn gpu(&self) -> Option<&Gpu> {
        self.gpu.as_ref()
    }
}

/// Returns the peak resident memory of this process in bytes; none where the system does not report it.
pub fn peak_bytes() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<usize>().ok()? * 1024)
}

/// Prints `cpu`, or the GPU's number, name, memory and precision.
impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        #[cfg(any(test, feature = "cuda"))]
        if let Some(gpu) = &self.gpu {
            return f.write_str(&gpu.name);
        }
        f.write_str("cpu")
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
    }

    #[test]
    fn auto_falls_back_to_the_cpu_and_says_why() -> crate::Result<()> {
        let (machine, why) = Machine::open(Choice::Auto, Precision::default())?;
        // With a usable GPU, or in a build without the GPU engine, there is no reason to give.
        assert_eq!(machine.to_string() == "cpu" && cfg!(feature = "cuda"), why.is_some());
        let asked = Machine::open(Choice::Cuda(4096), Precision::default()).err().map(|e| e.to_string());
        assert!(asked.is_some_and(|error| !error.contains('\n')));
        Ok(())
    }
}
