//! A GPU with a memory pool, and typed arrays in its memory.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Result, bail};
use half::{bf16, f16};

use super::{Arg, Gpu, Launch, Matrix, Memory, Product, Transfer};
use crate::dist::{Collective, Ranks};

/// Element type of an [`Array`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Element {
    U8,
    I32,
    I64,
    F32,
    F64,
    Bf16,
    F16,
}

impl Element {
    pub fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::Bf16 | Self::F16 => 2,
            Self::I32 | Self::F32 => 4,
            Self::I64 | Self::F64 => 8,
        }
    }

    /// Elements per access: kernels read and write 16 bytes at a time.
    pub fn per_access(self) -> usize {
        16 / self.bytes()
    }

    /// Suffix of the names of kernels for this type.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::U8 => "u8",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

/// A GPU with a pool of freed memory for reuse, by size: a training step asks for the same sizes each time.
#[derive(Clone)]
pub(crate) struct Device(Arc<Inner>);

struct Inner {
    gpu: Box<dyn Gpu>,
    /// Pooled allocations, by length in bytes.
    free: Mutex<BTreeMap<usize, Vec<Memory>>>,
    num_bytes: AtomicUsize,
    /// Whether the devices of all ranks are connected, once it was tried.
    is_connected: Mutex<Option<bool>>,
}

/// A GPU, and the type of its products' factors.
#[derive(Clone, Debug)]
pub(crate) struct GpuBackend {
    pub device: Device,
    pub element: Element,
}

/// Typed elements in device memory. Clones share the memory.
#[derive(Clone)]
pub(crate) struct Array {
    piece: Arc<Piece>,
    /// Index of the first element within the piece.
    start: usize,
    len: usize,
    element: Element,
}

/// An allocation that returns to the pool on drop.
struct Piece {
    /// `None` only during `drop`.
    memory: Option<Memory>,
    device: Device,
}

impl Drop for Piece {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.device.free().entry(memory.bytes).or_default().push(memory);
        }
    }
}

impl Device {
    pub fn new(gpu: Box<dyn Gpu>) -> Self {
        Self(Arc::new(Inner {
            gpu,
            free: Mutex::default(),
            num_bytes: AtomicUsize::new(0),
            is_connected: Mutex::default(),
        }))
    }

    fn free(&self) -> std::sync::MutexGuard<'_, BTreeMap<usize, Vec<Memory>>> {
        self.0.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of bytes allocated on the device, in use or pooled.
    pub fn num_bytes(&self) -> usize {
        self.0.num_bytes.load(Ordering::Relaxed)
    }

    /// The underlying device.
    pub fn gpu(&self) -> &dyn Gpu {
        &*self.0.gpu
    }

    /// Returns an uninitialised array.
    pub fn array(&self, element: Element, len: usize) -> Result<Array> {
        let bytes = (len.max(1) * element.bytes()).next_multiple_of(256);
        let found = self.free().get_mut(&bytes).and_then(Vec::pop);
        let memory = match found {
            Some(memory) => memory,
            None => {
                // Out of memory: free the pool, whose pieces have other sizes (perhaps of another batch size), and
                // retry.
                let memory = self.0.gpu.alloc(bytes).or_else(|_| {
                    let waiting: usize = std::mem::take(&mut *self.free()).values().flatten().map(|m| m.bytes).sum();
                    self.0.num_bytes.fetch_sub(waiting, Ordering::Relaxed);
                    self.0.gpu.alloc(bytes)
                })?;
                self.0.num_bytes.fetch_add(bytes, Ordering::Relaxed);
                memory
            }
        };
        let piece = Arc::new(Piece { memory: Some(memory), device: self.clone() });
        Ok(Array { piece, start: 0, len, element })
    }

    pub fn zeros(&self, element: Element, len: usize) -> Result<Array> {
        let array = self.array(element, len)?;
        array.fill_with_zeros()?;
        Ok(array)
    }

    /// Copies values to a new array on the device.
    pub fn upload<T: Plain>(&self, values: &[T]) -> Result<Array> {
        let array = self.array(T::ELEMENT, values.len())?;
        array.write(values)?;
        Ok(array)
    }

    /// Launches a kernel; an empty grid does nothing.
    ///
    /// # Safety
    /// Same as for [`Gpu::launch`]: the arguments have the kernel's types, in its order, and it stays inside the arrays.
    pub unsafe fn launch(&self, kernel: &str, launch: Launch, args: &[Arg]) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        // SAFETY: by this function's contract.
        unsafe { self.0.gpu.launch(kernel, launch, args) }
    }

    /// Multiplies matrices.
    ///
    /// # Errors
    /// When a matrix does not fit its array.
    pub fn multiply(&self, product: &Product) -> Result<()> {
        let Product { m, n, k, a, b, c, .. } = *product;
        for (matrix, [rows, columns]) in [(a, [m, k]), (b, [k, n]), (c, [m, n])] {
            let [rows, columns] = if matrix.is_transposed { [columns, rows] } else { [rows, columns] };
            let end = rows.saturating_sub(1) * matrix.stride + columns;
            if columns > matrix.stride || end > matrix.array.len() {
                let (stride, len) = (matrix.stride, matrix.array.len());
                bail!("a matrix of {rows} x {columns}, {stride} from row to row, in an array of {len} elements");
            }
        }
        // SAFETY: the matrices lie in their arrays.
        unsafe { self.0.gpu.multiply(product) }
    }

    /// Whether the devices of all ranks reach each other; the first call tries to connect them.
    ///
    /// # Errors
    /// Same as for [`Gpu::connect`].
    pub fn is_connected(&self, ranks: &Ranks) -> crate::Result<bool> {
        let mut is_connected = self.0.is_connected.lock().unwrap_or_else(PoisonError::into_inner);
        match *is_connected {
            Some(known) => Ok(known),
            None => Ok(*is_connected.insert(self.0.gpu.connect(ranks)?)),
        }
    }

    /// Queues a sum over the connected devices of all ranks, in place.
    ///
    /// # Safety
    /// The arrays are kept and not used before [`Gpu::await_collectives`].
    pub unsafe fn begin_sum(&self, element: Element, arrays: &[Array]) -> Result<()> {
        let in_place = |array: &Array| {
            fits("a sum over ranks", element, &[(Some(array), array.len)])?;
            Ok(Transfer { from: array.address(), to: array.address(), len: array.len })
        };
        let transfers = arrays.iter().map(in_place).collect::<Result<Vec<_>>>()?;
        // SAFETY: each transfer is an array of this device, and by this function's contract.
        unsafe { self.0.gpu.collect(Collective::Sum, element, &transfers) }
    }

    /// Does a collective operation over the connected devices of `size` ranks.
    ///
    /// # Errors
    /// When there are no equal parts and the operation needs some, or the devices' library fails.
    pub fn collect(&self, x: &Array, how: Collective, size: usize) -> crate::Result<Array> {
        let y = self.array(x.element, how.len(x.len, size)?)?;
        let transfer = Transfer { from: x.address(), to: y.address(), len: x.len };
        // SAFETY: there is room for what comes, and nothing uses the arrays before the operation is over.
        unsafe { self.0.gpu.collect(how, x.element, &[transfer])? };
        self.0.gpu.await_collectives()?;
        Ok(y)
    }

    /// Copies an array to another one of the same size.
    ///
    /// # Errors
    /// When the device copies nothing.
    #[cfg(feature = "cuda")]
    pub fn copy(&self, x: &Array, y: &Array) -> Result<()> {
        fits("copy", x.element, &[(Some(y), x.len)])?;
        if Arc::ptr_eq(&x.piece, &y.piece) {
            bail!("copy: to the same memory");
        }
        // SAFETY: the two lie in memory of their own, and are as long as each other.
        unsafe { self.0.gpu.copy(y.address(), x.address(), x.len * x.element.bytes()) }
    }
}

/// Host types that arrays are written from and read into.
pub(crate) trait Plain: Copy + Default {
    const ELEMENT: Element;
    fn bytes(values: &[Self]) -> &[u8];
    fn bytes_mut(values: &mut [Self]) -> &mut [u8];
}

macro_rules! plain {
    ($($T:ty: $element:ident),*) => {$(
        impl Plain for $T {
            const ELEMENT: Element = Element::$element;

            fn bytes(values: &[Self]) -> &[u8] {
                // SAFETY: the type has no padding, and any byte is a `u8`; the length is that of the slice.
                unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
            }

            fn bytes_mut(values: &mut [Self]) -> &mut [u8] {
                // SAFETY: as above, and any bytes are a valid value of the type.
                unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
            }
        }
    )*};
}

plain!(u8: U8, i32: I32, i64: I64, f32: F32, f64: F64, bf16: Bf16, f16: F16);

impl Array {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn element(&self) -> Element {
        self.element
    }

    pub fn device(&self) -> &Device {
        &self.piece.device
    }

    pub fn address(&self) -> u64 {
        let memory = self.piece.memory.as_ref().expect("only `drop` takes it");
        memory.address + (self.start * self.element.bytes()) as u64
    }

    /// The array as a kernel argument.
    pub fn arg(&self) -> Arg<'_> {
        Arg::Array(self)
    }

    /// The array as a matrix of `stride` columns.
    pub fn matrix(&self, stride: usize) -> Matrix<'_> {
        Matrix { array: self, stride, is_transposed: false }
    }

    /// Returns `len` elements from `start` on, in the same memory.
    pub fn part(&self, start: usize, len: usize) -> Self {
        assert!(start + len <= self.len, "elements {start}.. {len} of {}", self.len);
        Self { start: self.start + start, len, ..self.clone() }
    }

    pub fn fill_with_zeros(&self) -> Result<()> {
        // SAFETY: the array has that many bytes.
        unsafe { self.device().gpu().zero(self.address(), self.len * self.element.bytes()) }
    }

    pub fn write<T: Plain>(&self, values: &[T]) -> Result<()> {
        self.check::<T>(values.len())?;
        if values.is_empty() {
            return Ok(());
        }
        // SAFETY: the array has as many bytes as the values.
        unsafe { self.device().gpu().write(self.address(), T::bytes(values)) }
    }

    /// Waits for all queued work and returns the values.
    pub fn read<T: Plain>(&self) -> Result<Vec<T>> {
        self.check::<T>(self.len)?;
        let mut values = vec![T::default(); self.len];
        if values.is_empty() {
            return Ok(values);
        }
        // SAFETY: the array has as many bytes as the values.
        unsafe { self.device().gpu().read(self.address(), T::bytes_mut(&mut values))? };
        Ok(values)
    }

    fn check<T: Plain>(&self, len: usize) -> Result<()> {
        if self.element != T::ELEMENT || self.len != len {
            bail!("{len} {:?} for an array of {} {:?}", T::ELEMENT, self.len, self.element);
        }
        Ok(())
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Device")
    }
}

impl std::fmt::Debug for Array {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Array({} {:?})", self.len, self.element)
    }
}

/// Checks the type and the lengths of arrays, so that a kernel stays inside of them. Those that are not given fit.
///
/// # Errors
/// Names `what` and the first array that does not fit.
pub(super) fn fits(what: &str, element: Element, arrays: &[(Option<&Array>, usize)]) -> Result<()> {
    for (array, len) in arrays {
        if let Some(array) = array.filter(|array| array.element != element || array.len != *len) {
            bail!("{what}: expected {len} {element:?}, found {} {:?}", array.len, array.element);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::host::Host;

    /// A device with little memory.
    struct Small {
        host: Host,
        left: Arc<Mutex<usize>>,
    }

    /// Adds its bytes to those left on drop.
    struct Lent(Memory, Arc<Mutex<usize>>);

    impl Drop for Lent {
        fn drop(&mut self) {
            *self.1.lock().expect("no test panicked with it") += self.0.bytes;
        }
    }

    impl Gpu for Small {
        fn alloc(&self, bytes: usize) -> Result<Memory> {
            let mut left = self.left.lock().expect("no test panicked with it");
            match left.checked_sub(bytes) {
                Some(rest) => *left = rest,
                None => bail!("{bytes} bytes, {left} are left"),
            }
            let memory = self.host.alloc(bytes)?;
            Ok(Memory { address: memory.address, bytes, _owner: Box::new(Lent(memory, self.left.clone())) })
        }

        unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<()> {
            // SAFETY: by this function's contract; so are those below.
            unsafe { self.host.write(to, bytes) }
        }

        unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
            // SAFETY: as above.
            unsafe { self.host.read(from, bytes) }
        }

        unsafe fn zero(&self, at: u64, bytes: usize) -> Result<()> {
            // SAFETY: as above.
            unsafe { self.host.zero(at, bytes) }
        }

        unsafe fn launch(&self, kernel: &str, launch: Launch, args: &[Arg]) -> Result<()> {
            // SAFETY: as above.
            unsafe { self.host.launch(kernel, launch, args) }
        }

        unsafe fn multiply(&self, product: &Product) -> Result<()> {
            // SAFETY: as above.
            unsafe { self.host.multiply(product) }
        }
    }

    #[test]
    fn memory_that_waits_is_used_again_or_given_up_for_another_size() -> Result<()> {
        let device = Device::new(Box::new(Small { host: Host::new(), left: Arc::new(Mutex::new(4096)) }));
        let first = device.upload(&vec![1f32; 512])?;
        let address = first.address();
        let part = first.part(100, 12);
        drop(first);
        assert_eq!(part.read::<f32>()?, [1.0; 12], "a part keeps its memory");
        drop(part);
        assert_eq!((device.array(Element::F32, 512)?.address(), device.num_bytes()), (address, 2048));
        // 2048 bytes are pooled and 2048 are left: 3072 fit once the pool is freed.
        assert_eq!((device.zeros(Element::U8, 3072)?.len(), device.num_bytes()), (3072, 3072));
        let error = device.array(Element::F64, 513).unwrap_err().to_string();
        assert!(error.contains("4352 bytes, 4096 are left"), "{error}");
        Ok(())
    }

    #[test]
    fn values_of_another_type_or_number_are_an_error() -> Result<()> {
        let device = crate::gpu::tests::device();
        let array = device.upload(&[1f32, 2.0])?;
        assert!(array.read::<i32>().is_err_and(|e| e.to_string().contains("2 I32 for an array of 2 F32")));
        assert!(array.write(&[1f32]).is_err_and(|e| e.to_string().contains("1 F32 for an array of 2 F32")));
        Ok(())
    }

    #[test]
    fn products_that_do_not_fit_their_arrays_are_an_error() -> Result<()> {
        let device = crate::gpu::tests::device();
        let [a, b, c] = [6, 12, 8].map(|len| device.zeros(Element::F32, len));
        let (a, b, c) = (a?, b?, c?);
        let product =
            Product { m: 2, n: 4, k: 3, a: a.matrix(3), b: b.matrix(4), c: c.matrix(4), alpha: 1.0, beta: 0.0 };
        device.multiply(&product)?;
        let error = |product: Product| device.multiply(&product).expect_err("an error").to_string();
        assert!(error(Product { m: 3, ..product }).contains("a matrix of 3 x 3, 3 from row to row, in an array of 6"));
        assert!(error(Product { c: c.matrix(3), ..product }).contains("a matrix of 2 x 4, 3 from row to row"));
        assert!(error(Product { b: b.matrix(4).transposed(), ..product }).contains("a matrix of 4 x 3, 4 from row"));
        Ok(())
    }

    #[test]
    fn long_copies_arrive_whole() -> Result<()> {
        let device = crate::gpu::tests::device();
        // More than a GPU is sent in one piece, and no multiple of that.
        let values: Vec<i32> = (0..2_500_001).collect();
        assert!(device.upload(&values)?.read::<i32>()? == values);
        Ok(())
    }
}
