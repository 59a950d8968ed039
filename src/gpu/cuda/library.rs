//! CUDA's libraries, loaded at run time: their functions with plain numbers as results.
//!
//! A result that a library's version does not know yet would be undefined behaviour in a Rust enum, and a function that
//! it lacks must be an error rather than a panic. So a library is taken only if it has everything that is called.

use std::path::{Path, PathBuf};

use candle_core::{Error, Result, bail};
use libloading::Library;

/// A library that was found, and where.
pub(super) struct Found {
    pub library: Library,
    /// A path; the file's name alone if the system's search found it.
    pub place: String,
}

/// Loads the first library of these names that there is: in a folder of `LD_LIBRARY_PATH`, then in those where CUDA's
/// toolkit and Python's wheels put theirs, then wherever the system searches.
pub(super) fn load(names: &[&str]) -> Option<Found> {
    let asked = std::env::var_os("LD_LIBRARY_PATH").map(|paths| std::env::split_paths(&paths).collect::<Vec<_>>());
    let folders: Vec<PathBuf> = asked.unwrap_or_default().into_iter().chain(folders()).collect();
    let paths = names.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    let mut candidates = paths.filter(|path| path.is_file()).chain(names.iter().map(PathBuf::from));
    candidates.find_map(|path| {
        // cuBLAS needs its sibling, which is found by name once it is loaded, wherever it lies.
        let sibling = path.with_file_name(path.file_name()?.to_str()?.replace("cublas.", "cublasLt."));
        // SAFETY: NVIDIA's libraries; loading them runs nothing that depends on this process.
        let library = unsafe {
            if sibling != path && sibling.is_file() {
                std::mem::forget(Library::new(&sibling));
            }
            Library::new(&path)
        };
        Some(Found { library: library.ok()?, place: path.display().to_string() })
    })
}

/// Folders in which CUDA's libraries lie, if there are any.
fn folders() -> Vec<PathBuf> {
    let of = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let mut folders = Vec::new();
    for home in [of("CUDA_HOME"), of("CUDA_PATH"), Some(PathBuf::from("/usr/local/cuda"))].into_iter().flatten() {
        // In Python's wheels cuDNN and NCCL have folders of their own beside the toolkit's.
        folders.extend(["lib64", "lib", "../cudnn/lib", "../nccl/lib"].map(|part| home.join(part)));
    }
    let local = of("HOME").map(|home| home.join(".local"));
    let prefixes = [of("VIRTUAL_ENV"), of("CONDA_PREFIX"), local, Some("/usr/local".into()), Some("/usr".into())];
    for lib in prefixes.into_iter().flatten().map(|prefix| prefix.join("lib")) {
        for python in entries_that_start_with(&lib, "python3") {
            for packages in ["site-packages", "dist-packages"].map(|name| python.join(name).join("nvidia")) {
                folders.extend(["cu13/lib", "cublas/lib", "cudnn/lib", "nccl/lib"].map(|part| packages.join(part)));
            }
        }
    }
    folders
}

fn entries_that_start_with(folder: &Path, start: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let named = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(start));
    let mut paths: Vec<PathBuf> = named.map(|entry| entry.path()).collect();
    // Of several versions the last.
    paths.sort();
    paths.reverse();
    paths
}

/// Checks that a library has these functions.
///
/// # Errors
/// When one is missing.
pub(super) fn check(library: &Library, place: &str, functions: &[&str]) -> Result<()> {
    for name in functions {
        // SAFETY: the symbol is only looked for.
        if unsafe { library.get::<*const ()>(name.as_bytes()) }.is_err() {
            bail!("{place} has no function {name}: another version than this build is for");
        }
    }
    Ok(())
}

/// An error of a library's call, by the name of its status or of its class of statuses.
pub(super) fn failed(title: &str, call: &str, status: i32, class: i32, names: &[(i32, &str)]) -> Error {
    match names.iter().find(|(known, _)| *known == class) {
        Some((_, name)) => Error::Msg(format!("{title}: {call}: {name} ({status})")),
        None => Error::Msg(format!("{title}: {call}: status {status}")),
    }
}

/// Declares a library's functions as methods that return the status as a number.
macro_rules! functions {
    ($(#[$doc:meta])* $Name:ident { $($function:ident($($arg:ident: $Type:ty),* $(,)?) -> $Result:ty;)* }) => {
        $(#[$doc])*
        #[expect(non_snake_case, reason = "the library's names")]
        pub(super) struct $Name {
            $(pub $function: unsafe extern "C" fn($($Type),*) -> $Result,)*
            /// Keeps the functions' code loaded.
            _library: libloading::Library,
        }

        impl $Name {
            /// Takes the functions from a library that lies at `place`.
            ///
            /// # Errors
            /// When one is missing.
            pub fn of(library: libloading::Library, place: &str) -> candle_core::Result<Self> {
                super::library::check(&library, place, &[$(stringify!($function)),*])?;
                // SAFETY: the types are those of the library's documentation.
                unsafe {
                    Ok(Self {
                        $($function: *library.get(stringify!($function).as_bytes()).map_err(candle_core::Error::wrap)?,)*
                        _library: library,
                    })
                }
            }
        }
    };
}
pub(super) use functions;
