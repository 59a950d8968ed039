//! Rebuilds tensors from their description in the pickle: a storage, an offset, a shape and strides.

use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::pickle::{Id, Object, Pickle, Value, shown};
use crate::weights::elements::{ElementType, num_elements, tensor};

/// Maximum size of all tensors together, as a multiple of the file size. Views of one storage may overlap, and the
/// limit keeps a small file from claiming any number of them.
const MAX_GROWTH: usize = 4;
/// Maximum nesting of wrappers, such as a parameter around a tensor subclass.
const MAX_WRAPPERS: usize = 8;
/// Maximum number of dimensions. A tuple of sizes is stored once and may be shared by all tensors, so it must be short.
const MAX_DIMS: usize = 16;

/// The bytes of a storage.
pub(super) struct Storage<'a> {
    bytes: &'a [u8],
}

impl<'a> Storage<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }
}

/// A reference to a storage, from a persistent id.
pub(super) struct StorageReference<'p> {
    pub(super) key: &'p str,
    /// Element type, or the reason why it is not supported.
    pub(super) element: Result<ElementType, String>,
    num_elements: i64,
}

/// Parses a persistent id as a reference to a storage, `('storage', class, key, device, number of elements[, view])`;
/// returns `None` for other persistent ids.
pub(super) fn storage_reference<'p>(pickle: &'p Pickle<'_>, id: Id) -> Option<StorageReference<'p>> {
    let &[tag, class, key, _, count, ref view @ ..] = pickle.elements(id)? else { return None };
    if pickle.text(tag) != Some("storage") {
        return None;
    }
    let class = pickle.global(class);
    let is_view = view.iter().any(|v| !matches!(pickle.get(*v), Value::None));
    let element = match class {
        _ if is_view => Err("it is a view of another storage, a form that only torch 0.1 wrote".to_owned()),
        Some((_, class)) => element_type(class).ok_or_else(|| format!("its type {} is not supported", shown(class))),
        None => Err("its type has no name".to_owned()),
    };
    Some(StorageReference { key: pickle.text(key)?, element, num_elements: pickle.int(count)? })
}

/// Returns the element type of a storage class such as `FloatStorage`.
fn element_type(name: &str) -> Option<ElementType> {
    Some(match name {
        "DoubleStorage" => ElementType::F64,
        "FloatStorage" => ElementType::F32,
        "HalfStorage" => ElementType::F16,
        "BFloat16Storage" => ElementType::Bf16,
        "LongStorage" => ElementType::I64,
        "IntStorage" => ElementType::I32,
        "ShortStorage" => ElementType::I16,
        "CharStorage" => ElementType::I8,
        "ByteStorage" | "UntypedStorage" | "_UntypedStorage" => ElementType::U8,
        "BoolStorage" => ElementType::Bool,
        _ => return None,
    })
}

/// Complete description of a tensor: two tensors with equal views are the same.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct View<'p> {
    storage: &'p str,
    element: ElementType,
    offset: usize,
    dims: Vec<usize>,
    strides: Vec<usize>,
}

/// Builder of tensors that reuses those already made.
pub(super) struct Rebuilder<'p, 'a> {
    pickle: &'p Pickle<'a>,
    storages: BTreeMap<String, Storage<'a>>,
    made: BTreeMap<View<'p>, Tensor>,
    /// Number of bytes that further tensors may take.
    budget: usize,
}

impl<'p, 'a> Rebuilder<'p, 'a> {
    /// Returns a builder for a file of `num_bytes` bytes.
    pub(super) fn new(pickle: &'p Pickle<'a>, storages: BTreeMap<String, Storage<'a>>, num_bytes: usize) -> Self {
        Self { pickle, storages, made: BTreeMap::new(), budget: num_bytes.saturating_mul(MAX_GROWTH) }
    }

    /// Whether a value is a tensor or parameter, supported or not.
    pub(super) fn is_tensor(&self, id: Id) -> bool {
        let Value::Object(object) = self.pickle.get(id) else { return false };
        match self.pickle.global(object.callable) {
            Some(("torch._utils", name)) => name.starts_with("_rebuild_"),
            Some(("torch._tensor", "_rebuild_from_type_v2")) => true,
            // Written before torch 0.4.
            Some(("torch.nn.parameter", "Parameter") | ("torch.autograd.variable", "Variable")) => true,
            _ => false,
        }
    }

    /// Returns the tensor that a value describes, made contiguous.
    pub(super) fn tensor(&mut self, id: Id) -> Result<Tensor, String> {
        let mut id = id;
        for _ in 0..MAX_WRAPPERS {
            let Value::Object(object) = self.pickle.get(id) else {
                return Err(format!("expected a tensor, found {}", self.pickle.kind(id)));
            };
            let (module, name) = self.pickle.global(object.callable).unwrap_or_default();
            let args = self.args(object);
            match (module, name) {
                ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => return self.view(args),
                ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state")
                | ("torch.nn.parameter", "Parameter")
                | ("torch.autograd.variable", "Variable") => {
                    id = *args.first().ok_or_else(|| format!("{name} has no argument, expected a tensor"))?;
                }
                // Arguments: a function, the type of its result, the function's arguments, the attributes of the
                // result.
                ("torch._tensor", "_rebuild_from_type_v2") => {
                    let (Some(callable), Some(Value::Tuple(args))) =
                        (args.first(), args.get(2).map(|a| self.pickle.get(*a)))
                    else {
                        return Err(format!("{name}: expected a function and its arguments"));
                    };
                    return match self.pickle.global(*callable) {
                        Some(("torch._utils", "_rebuild_tensor_v2")) => self.view(args),
                        _ => Err(format!("{name} of {} is not supported", self.pickle.kind(*callable))),
                    };
                }
                _ => return Err(format!("{} is not supported, expected a dense tensor", self.pickle.kind(id))),
            }
        }
        Err(format!("wrapped more than {MAX_WRAPPERS} times"))
    }

    fn args(&self, object: &Object) -> &'p [Id] {
        self.pickle.elements(object.args).unwrap_or_default()
    }

    /// Returns the tensor of a `_rebuild_tensor` call. Its arguments are `storage, offset, size, stride`, followed in
    /// version 2 by `requires_grad, hooks` and sometimes `metadata`.
    fn view(&mut self, args: &'p [Id]) -> Result<Tensor, String> {
        let pickle = self.pickle;
        let &[storage, offset, size, stride, ref rest @ ..] = args else {
            return Err(format!("rebuilt from {} arguments, expected at least 4", args.len()));
        };
        let reference = match pickle.get(storage) {
            Value::PersistentId(id) => storage_reference(pickle, *id),
            _ => None,
        };
        let reference = reference.ok_or_else(|| format!("expected a storage, found {}", pickle.kind(storage)))?;
        let wrong = |what: String| format!("storage {}: {what}", shown(reference.key));
        let element = reference.element.map_err(wrong)?;
        // Non-empty metadata asks for a conjugation or negation on reading.
        if rest.get(2).is_some_and(|m| match pickle.get(*m) {
            Value::None => false,
            Value::Dict(items) => !items.is_empty(),
            _ => true,
        }) {
            return Err("its metadata (a lazy negation or conjugation) is not supported".to_owned());
        }
        let storage = self.storages.get(reference.key).ok_or_else(|| wrong("is not in the file".to_owned()))?;
        let claimed = usize::try_from(reference.num_elements).ok().and_then(|n| n.checked_mul(element.size()));
        if claimed != Some(storage.bytes.len()) {
            let (claimed, size, found) = (reference.num_elements, element.size(), storage.bytes.len());
            return Err(wrong(format!("expected {claimed} elements of {size} bytes, found {found} bytes")));
        }
        let sizes = |id: Id, what: &str| -> Result<Vec<usize>, String> {
            let ids = pickle.elements(id).filter(|ids| ids.len() <= MAX_DIMS);
            let ids = ids.ok_or_else(|| format!("{what}: expected at most {MAX_DIMS}, found {}", pickle.kind(id)))?;
            ids.iter().map(|id| count(pickle, *id, what)).collect()
        };
        let view = View {
            storage: reference.key,
            element,
            offset: count(pickle, offset, "storage offset")?,
            dims: sizes(size, "size")?,
            strides: sizes(stride, "stride")?,
        };
        if let Some(made) = self.made.get(&view) {
            return Ok(made.clone());
        }
        let made = view.read(storage.bytes, &mut self.budget)?;
        self.made.insert(view, made.clone());
        Ok(made)
    }
}

fn count(pickle: &Pickle<'_>, id: Id, what: &str) -> Result<usize, String> {
    let int = pickle.int(id).ok_or_else(|| format!("{what}: expected an integer, found {}", pickle.kind(id)))?;
    usize::try_from(int).map_err(|_| format!("{what}: expected a non-negative number, found {int}"))
}

impl View<'_> {
    fn read(&self, bytes: &[u8], budget: &mut usize) -> Result<Tensor, String> {
        let Self { element, offset, dims, strides, .. } = self;
        let shown = || format!("size {dims:?}, stride {strides:?}, offset {offset}");
        if dims.len() != strides.len() {
            return Err(format!("{}: expected as many strides as sizes", shown()));
        }
        let available = bytes.len() / element.size();
        let num = num_elements(dims).ok_or_else(|| format!("{}: exceeds the address space", shown()))?;
        if num == 0 {
            return tensor(*element, &[], dims).map_err(|e| e.to_string());
        }
        // Index of the last element. Strides of 0 give more elements than the storage has: `budget` bounds them.
        let last = dims.iter().zip(strides).try_fold(*offset, |last, (dim, stride)| {
            (dim - 1).checked_mul(*stride).and_then(|step| last.checked_add(step))
        });
        if last.is_none_or(|last| last >= available) {
            return Err(format!("{}: reaches beyond the {available} elements of its storage", shown()));
        }
        let num_bytes = num * element.size();
        *budget = budget.checked_sub(num_bytes).ok_or_else(|| {
            format!("{}: all tensors together would exceed {MAX_GROWTH} times the file size", shown())
        })?;
        let start = offset * element.size();
        let read = if self.is_contiguous() {
            tensor(*element, &bytes[start..start + num_bytes], dims)
        } else {
            tensor(*element, &self.gather(bytes, num), dims)
        };
        read.map_err(|e| e.to_string())
    }

    fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.dims.iter().zip(&self.strides).rev().all(|(&dim, &stride)| {
            let is_as_expected = dim == 1 || stride == expected;
            expected *= dim;
            is_as_expected
        })
    }

    /// Returns the bytes of the `num` elements, last dimension fastest. The view must lie within `bytes`.
    fn gather(&self, bytes: &[u8], num: usize) -> Vec<u8> {
        let size = self.element.size();
        let mut gathered = Vec::with_capacity(num * size);
        let mut index = vec![0; self.dims.len()];
        let mut place = self.offset;
        for _ in 0..num {
            gathered.extend_from_slice(&bytes[place * size..(place + 1) * size]);
            for ((i, dim), stride) in index.iter_mut().zip(&self.dims).zip(&self.strides).rev() {
                *i += 1;
                place += stride;
                if *i < *dim {
                    break;
                }
                place -= stride * dim;
                *i = 0;
            }
        }
        gathered
    }
}
