//! Records the commit that the crate is built from, and compiles the GPU's kernels under `cuda`.

use std::path::{Path, PathBuf};
use std::process::{Command, exit};

fn main() {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).output().ok().filter(|o| o.status.success())?;
        String::from_utf8(output.stdout).ok().map(|s| s.trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".to_owned());
    println!("cargo::rustc-env=MASKINV_COMMIT={commit}");
    if let Some(head) = git(&["rev-parse", "--git-path", "logs/HEAD"]) {
        println!("cargo::rerun-if-changed={head}");
    }
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
        kernels();
    }
}

/// Compiles each file of `kernels/` to machine code for the GPUs named by `CUDA_COMPUTE_CAP` ("90", or "80,90"; all
/// that the crate is for if it is not set), and PTX for later ones.
fn kernels() {
    for name in ["NVCC", "NVCC_CCBIN", "NVCC_APPEND_FLAGS", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let caps = std::env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "80,86,89,90,100,120".to_owned());
    let caps: Vec<&str> = caps.split(',').map(str::trim).collect();
    if let Some(cap) = caps.iter().find(|cap| cap.parse::<u32>().is_ok_and(|cap| cap < 80) || cap.is_empty()) {
        fail(&format!("CUDA_COMPUTE_CAP: expected 80 or newer (bf16 needs it), such as 90 or 80,90, found {cap:?}"));
    }
    // GPUs that are newer still compile the PTX of the newest.
    let newest = caps.iter().filter_map(|cap| cap.trim_end_matches(['a', 'f']).parse::<u32>().ok()).max();
    let Some(newest) = newest else { fail(&format!("CUDA_COMPUTE_CAP: expected numbers such as 90, found {caps:?}")) };
    println!("cargo::rustc-env=MASKINV_CUDA_VERSION={}", version_of_nvcc());
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let (mut running, mut list) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir("kernels").expect("kernels/ is part of the crate") {
        let source = entry.expect("an entry of kernels/").path();
        if source.is_file() {
            println!("cargo::rerun-if-changed={}", source.display());
        }
        let Some(stem) = source.file_stem().filter(|_| source.extension().is_some_and(|e| e == "cu")) else { continue };
        let mut command = Command::new(nvcc());
        command.args(["-std=c++17", "-O3", "-fatbin"]).arg(&source);
        command.args(caps.iter().map(|cap| format!("-gencode=arch=compute_{cap},code=sm_{cap}")));
        command.arg(format!("-gencode=arch=compute_{newest},code=compute_{newest}"));
        let compiled = out.join(stem).with_extension("fatbin");
        command.arg("-o").arg(&compiled);
        list.push(format!("({:?}, include_bytes!({compiled:?}))", stem.to_string_lossy()));
        match command.spawn() {
            Ok(child) => running.push((source, child)),
            Err(error) => fail(&format!(
                "the feature `cuda` needs NVIDIA's compiler: {} does not start: {error}. Set NVCC or CUDA_HOME, or \
                 install it without root by `CUDA_HOME=$(scripts/cuda-toolkit)`",
                Path::new(command.get_program()).display()
            )),
        }
    }
    for (source, mut child) in running {
        if !child.wait().is_ok_and(|status| status.success()) {
            fail(&format!("{}: the compiler failed, see above", source.display()));
        }
    }
    list.sort();
    let list = format!("&[{}]", list.join(", "));
    if let Err(error) = std::fs::write(out.join("kernels.rs"), list) {
        fail(&format!("{}: {error}", out.display()));
    }
}

/// NVIDIA's compiler: that of `NVCC`, of a toolkit's folder, or of the path.
fn nvcc() -> PathBuf {
    let of_folder = |name| std::env::var_os(name).map(|folder| PathBuf::from(folder).join("bin/nvcc"));
    let named = std::env::var_os("NVCC").map(PathBuf::from);
    named.or_else(|| of_folder("CUDA_HOME")).or_else(|| of_folder("CUDA_PATH")).unwrap_or_else(|| "nvcc".into())
}

/// The compiler's version as CUDA's driver counts: 13000 is 13.0.
fn version_of_nvcc() -> u32 {
    let output = Command::new(nvcc()).arg("--version").output().map(|output| output.stdout).unwrap_or_default();
    let text = String::from_utf8_lossy(&output).into_owned();
    let release = text.split("release ").nth(1).and_then(|rest| rest.split(',').next()).unwrap_or_default();
    let mut parts = release.split('.').map(|part| part.parse::<u32>().unwrap_or_default());
    1000 * parts.next().unwrap_or_default() + 10 * parts.next().unwrap_or_default()
}

fn fail(what: &str) -> ! {
    println!("cargo::error={what}");
    exit(1)
}
