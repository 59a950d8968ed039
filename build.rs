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
    println!("cargo::rerun-if-changed=kernels");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let caps = std::env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "80,86,89,90".to_owned());
    let caps: Vec<&str> = caps.split(',').map(str::trim).collect();
    if let Some(cap) = caps.iter().find(|cap| cap.parse::<u32>().is_ok_and(|cap| cap < 80) || cap.is_empty()) {
        fail(&format!("CUDA_COMPUTE_CAP: expected 80 or newer (bf16 needs it), such as 90 or 80,90, found {cap:?}"));
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut running = Vec::new();
    for entry in std::fs::read_dir("kernels").expect("kernels/ is part of the crate") {
        let source = entry.expect("an entry of kernels/").path();
        let Some(stem) = source.file_stem().filter(|_| source.extension().is_some_and(|e| e == "cu")) else { continue };
        let mut command = Command::new(nvcc());
        command.args(["-std=c++17", "-O3", "-fatbin"]).arg(&source);
        command.args(caps.iter().map(|cap| format!("-gencode=arch=compute_{cap},code=sm_{cap}")));
        let last = caps.last().copied().unwrap_or("90").trim_end_matches('a');
        command.arg(format!("-gencode=arch=compute_{last},code=compute_{last}"));
        command.arg("-o").arg(out.join(stem).with_extension("fatbin"));
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
}

/// NVIDIA's compiler: that of `NVCC`, of a toolkit's folder, or of the path.
fn nvcc() -> PathBuf {
    let of_folder = |name| std::env::var_os(name).map(|folder| PathBuf::from(folder).join("bin/nvcc"));
    let named = std::env::var_os("NVCC").map(PathBuf::from);
    named.or_else(|| of_folder("CUDA_HOME")).or_else(|| of_folder("CUDA_PATH")).unwrap_or_else(|| "nvcc".into())
}

fn fail(what: &str) -> ! {
    println!("cargo::error={what}");
    exit(1)
}
