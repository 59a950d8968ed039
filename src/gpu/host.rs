//! Kernels on the CPU: the tests compile them as C++ and run the threads of a block one after the other
//! (`kernels/host`).

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use candle_core::{Result, bail};
use half::{bf16, f16};
use libloading::Library;

use super::{Arg, Element, Gpu, Launch, Matrix, Memory, Product};

/// Guard bytes before and after each allocation, which no kernel may change.
const GUARD: usize = 256;
/// Initial value of every byte of memory: NaN in every float type.
const POISON: u8 = 0xff;

type HostLaunch = unsafe extern "C" fn(
    *const c_char,
    *const u32,
    *const u32,
    usize,
    *const c_char,
    *mut *mut c_void,
    u32,
) -> *const c_char;

/// Compiles `kernels/`, once per process.
fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let folder = tempfile::tempdir().expect("a folder for the compiled kernels");
        let compiler = option_env!("CXX").unwrap_or("c++");
        let mut command = Command::new(compiler);
        command.args(["-O1", "-std=c++17", "-shared", "-fPIC", "-Wno-unknown-pragmas", "-Wno-deprecated-declarations"]);
        // `_FORTIFY_SOURCE` aborts at jumps between stacks.
        command.arg("-U_FORTIFY_SOURCE");
        // Misaligned accesses and signed overflow abort the process.
        command.args(["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-DMASKINV_HOST"]);
        command.arg("-I").arg(kernels.join("host")).args(["-x", "c++"]);
        let mut sources: Vec<_> = std::fs::read_dir(&kernels)
            .expect("kernels/ is in the repository")
            .map(|entry| entry.expect("an entry of kernels/").path())
            .filter(|path| path.extension().is_some_and(|e| e == "cu"))
            .collect();
        sources.sort();
        let path = folder.path().join("kernels.so");
        command.args(sources).arg(kernels.join("host/host.cpp")).arg("-o").arg(&path);
        let output = command.output().unwrap_or_else(|e| panic!("{compiler}: {e}: the tests need a C++ compiler"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        // SAFETY: loading only runs the constructors of `Entry`, which build a list.
        unsafe { Library::new(path) }.expect("the compiled kernels load")
    })
}

/// Runs kernels on the CPU; each launch shuffles the order of the threads with another seed.
pub(super) struct Host {
    seed: AtomicU32,
}

impl Host {
    pub fn new() -> Self {
        Self { seed: 0.into() }
    }
}

/// Memory between guard bytes.
struct Guarded(Vec<u128>);

impl Guarded {
    fn new(bytes: usize) -> Self {
        let len = (2 * GUARD + bytes).div_ceil(16);
        Self(vec![u128::from_ne_bytes([POISON; 16]); len])
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let guard = GUARD / 16;
        let poison = u128::from_ne_bytes([POISON; 16]);
        let is_whole = |guard: &[u128]| guard.iter().all(|x| *x == poison);
        let is_inside = is_whole(&self.0[..guard]) && is_whole(&self.0[self.0.len() - guard..]);
        assert!(is_inside || std::thread::panicking(), "a kernel wrote outside of its memory");
    }
}

/// Bytes at an address that `Host` allocated.
///
/// # Safety
/// The bytes must lie in one live allocation, and nothing else may access them.
unsafe fn bytes<'a>(address: u64, len: usize) -> &'a mut [u8] {
    // SAFETY: by this function's contract.
    unsafe { std::slice::from_raw_parts_mut(address as *mut u8, len) }
}

impl Gpu for Host {
    fn alloc(&self, bytes: usize) -> Result<Memory> {
        let mut memory = Box::new(Guarded::new(bytes));
        let address = memory.0.as_mut_ptr() as u64 + GUARD as u64;
        Ok(Memory { address, bytes, _owner: memory })
    }

    unsafe fn write(&self, to: u64, from: &[u8]) -> Result<()> {
        // SAFETY: by this function's contract.
        unsafe { bytes(to, from.len()) }.copy_from_slice(from);
        Ok(())
    }

    unsafe fn read(&self, from: u64, to: &mut [u8]) -> Result<()> {
        // SAFETY: as above.
        to.copy_from_slice(unsafe { bytes(from, to.len()) });
        Ok(())
    }

    unsafe fn zero(&self, at: u64, len: usize) -> Result<()> {
        // SAFETY: as above.
        unsafe { bytes(at, len) }.fill(0);
        Ok(())
    }

    unsafe fn launch(&self, kernel: &str, launch: Launch, args: &[Arg]) -> Result<()> {
        // SAFETY: the name and type are those of host.cpp.
        let host_launch = unsafe { library().get::<HostLaunch>(b"host_launch\0") }.expect("host.cpp exports it");
        let name = CString::new(kernel).map_err(candle_core::Error::wrap)?;
        let types: String = args
            .iter()
            .map(|arg| match arg {
                Arg::Array(_) | Arg::Null => 'p',
                Arg::I32(_) => 'i',
                Arg::I64(_) => 'l',
                Arg::F32(_) => 'f',
            })
            .collect();
        let types = CString::new(types).expect("letters");
        let (grid, block) = ([launch.grid[0], launch.grid[1], 1], [launch.block, 1, 1]);
        let mut values: Vec<[u8; 8]> = args
            .iter()
            .map(|arg| {
                let mut bytes = [0; 8];
                match arg {
                    Arg::Array(array) => bytes = array.address().to_ne_bytes(),
                    Arg::Null => {}
                    Arg::I64(x) => bytes = x.to_ne_bytes(),
                    Arg::I32(x) => bytes[..4].copy_from_slice(&x.to_ne_bytes()),
                    Arg::F32(x) => bytes[..4].copy_from_slice(&x.to_ne_bytes()),
                }
                bytes
            })
            .collect();
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| value.as_mut_ptr().cast()).collect();
        let seed = self.seed.fetch_add(1, Ordering::Relaxed);
        // SAFETY: by this function's contract; the C++ side checks the types too.
        let error = unsafe {
            host_launch(
                name.as_ptr(),
                grid.as_ptr(),
                block.as_ptr(),
                launch.shared_bytes as usize,
                types.as_ptr(),
                pointers.as_mut_ptr(),
                seed,
            )
        };
        if !error.is_null() {
            // SAFETY: it is a string constant.
            bail!("{kernel}: {}", unsafe { CStr::from_ptr(error) }.to_string_lossy());
        }
        Ok(())
    }

    unsafe fn multiply(&self, product: &Product) -> Result<()> {
        let Product { m, n, k, a, b, c, alpha, beta } = *product;
        // SAFETY: by this function's contract; so are those below.
        let (a, b) = unsafe { (values(a, [m, k]), values(b, [k, n])) };
        // SAFETY: as above.
        let mut y = if beta == 0.0 { vec![0.0; m * n] } else { unsafe { values(c, [m, n]) } };
        // SAFETY: the slices have the stated sizes and strides.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                y.as_mut_ptr(),
                1,
                n as isize,
                beta != 0.0,
                a.as_ptr(),
                1,
                k as isize,
                b.as_ptr(),
                1,
                n as isize,
                beta,
                alpha,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
        for (row, y) in y.chunks_exact(n).enumerate() {
            // SAFETY: as above.
            y.iter().enumerate().for_each(|(column, y)| unsafe { set(c, row, column, *y) });
        }
        Ok(())
    }
}

fn address_of(matrix: Matrix, row: usize, column: usize) -> u64 {
    let (row, column) = if matrix.is_transposed { (column, row) } else { (row, column) };
    matrix.array.address() + ((row * matrix.stride + column) * matrix.element().bytes()) as u64
}

/// Values of a matrix, row by row.
///
/// # Safety
/// The matrix lies in its array.
unsafe fn values(matrix: Matrix, [rows, columns]: [usize; 2]) -> Vec<f32> {
    let at = |i: usize| address_of(matrix, i / columns, i % columns);
    // SAFETY: by this function's contract.
    let bytes = |i: usize| &*unsafe { bytes(at(i), matrix.element().bytes()) };
    let value = |i: usize| match (matrix.element(), bytes(i)) {
        (Element::F32, &[a, b, c, d]) => f32::from_ne_bytes([a, b, c, d]),
        (Element::Bf16, &[a, b]) => bf16::from_ne_bytes([a, b]).to_f32(),
        (Element::F16, &[a, b]) => f16::from_ne_bytes([a, b]).to_f32(),
        (other, _) => panic!("a matrix of {other:?}"),
    };
    (0..rows * columns).map(value).collect()
}

/// Writes an element of a matrix.
///
/// # Safety
/// The element lies in the matrix's array.
unsafe fn set(matrix: Matrix, row: usize, column: usize, value: f32) {
    let at = address_of(matrix, row, column);
    // SAFETY: by this function's contract.
    let bytes = unsafe { bytes(at, matrix.element().bytes()) };
    match matrix.element() {
        Element::F32 => bytes.copy_from_slice(&value.to_ne_bytes()),
        Element::Bf16 => bytes.copy_from_slice(&bf16::from_f32(value).to_ne_bytes()),
        Element::F16 => bytes.copy_from_slice(&f16::from_f32(value).to_ne_bytes()),
        other => panic!("a matrix of {other:?}"),
    }
}
