//! Tensors from what the pickle says of them: a storage, an offset, a shape and strides.

use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::pickle::{Id, Object, Pickle, Value, shown};
use crate::weights::elements::{ElementType, num_elements, tensor};

/// How many times the size of the file all tensors together may take: views of one storage may overlap, but a small file
/// cannot claim ever more of them.
const MAX_GROWTH: usize = 4;
/// Wrappers (a parameter of a subclass of a tensor) are not nested deeper.
const MAX_WRAPPERS: usize = 8;
/// Sizes are stored once and may be used by every tensor.
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

/// What a persistent id says of a storage.
pub(super) struct StorageReference<'p> {
    pub(super) key: &'p str,
    /// The type of the elements, or why it is not supported.
    pub(super) element: Result<ElementType, String>,
    num_elements: i64,
}

/// Returns what the id of a `PERSID` refers to if it is a storage:
/// `('storage', class, key, device, number of elements[, view])`.
pub(super) fn storage_reference<'p>(pickle: &'p Pickle<'_>, id: Id) -> Option<StorageReference<'p>> {
    let &[tag, class, key, _, count, ref view @ ..] = pickle.elements(id)? else { return None };
    if pickle.text(tag) != Some("storage") {
        return None;
    }
    let class = pickle.global(class);
    let is_view = view.iter().any(|v| !matches!(pickle.get(*v), Value::None));
    let element = match class {
        _ if is_view => Err("it is a view of another storage, which only torch 0.1 wrote".to_owned()),
        Some((_, class)) => element_type(class).ok_or_else(|| format!("its type {} is not supported", shown(class))),
        None => Err("its type has no name".to_owned()),
    };
    Some(StorageReference { key: pickle.text(key)?, element, num_elements: pickle.int(count)? })
}

/// The element type of `torch.FloatStorage` and the like.
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

/// What makes one tensor, all of it: two tensors with equal keys are the same.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct View<'p> {
    storage: &'p str,
    element: ElementType,
    offset: usize,
    dims: Vec<usize>,
    strides: Vec<usize>,
}

/// Makes tensors and remembers them.
pub(super) struct Rebuilder<'p, 'a> {
    pickle: &'p Pickle<'a>,
    storages: BTreeMap<String, Storage<'a>>,
    made: BTreeMap<View<'p>, Tensor>,
    /// How many bytes of tensors may still be made.
    budget: usize,
}

impl<'p, 'a> Rebuilder<'p, 'a> {
    /// For a file of `num_bytes`.
    pub(super) fn new(pickle: &'p Pickle<'a>, storages: BTreeMap<String, Storage<'a>>, num_bytes: usize) -> Self {
        Self { pickle, storages, made: BTreeMap::new(), budget: num_bytes.saturating_mul(MAX_GROWTH) }
    }

    /// Whether a value is a tensor or parameter, of any kind.
    pub(super) fn is_tensor(&self, id: Id) -> bool {
        let Value::Object(object) = self.pickle.get(id) else { return false };
        match self.pickle.global(object.callable) {
            Some(("torch._utils", name)) => name.starts_with("_rebuild_"),
            Some(("torch._tensor", "_rebuild_from_type_v2")) => true,
            // Before torch 0.4.
            Some(("torch.nn.parameter", "Parameter") | ("torch.autograd.variable", "Variable")) => true,
            _ => false,
        }
    }

    /// Returns the contiguous tensor that a value stands for.
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
                // A function, the type of its result, its arguments, the attributes of the result.
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
        Err(format!("it is wrapped more than {MAX_WRAPPERS} times"))
    }

    fn args(&self, object: &Object) -> &'p [Id] {
        self.pickle.elements(object.args).unwrap_or_default()
    }

    /// `(storage, offset, size, stride)`, in version 2 then `requires_grad, hooks` and sometimes `metadata`.
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
        // Conjugation and negation that are to be applied on reading.
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
    usize::try_from(int).map_err(|_| format!("{what}: expected no negative number, found {int}"))
}

impl View<'_> {
    fn read(&self, bytes: &[u8], budget: &mut usize) -> Result<Tensor, String> {
        let Self { element, offset, dims, strides, .. } = self;
        let shown = || format!("size {dims:?}, stride {strides:?}, offset {offset}");
        if dims.len() != strides.len() {
            return Err(format!("{}: expected as many strides as sizes", shown()));
        }
        let available = bytes.len() / element.size();
        let num = num_elements(dims).ok_or_else(|| format!("{}: larger than any memory", shown()))?;
        if num == 0 {
            return tensor(*element, &[], dims).map_err(|e| e.to_string());
        }
        // The place of the last element; strides of 0 would give more elements than there are.
        let last = dims.iter().zip(strides).try_fold(*offset, |last, (dim, stride)| {
            (dim - 1).checked_mul(*stride).and_then(|step| last.checked_add(step))
        });
        if num > available || last.is_none_or(|last| last >= available) {
            return Err(format!("{}: reaches beyond the {available} elements of its storage", shown()));
        }
        let num_bytes = num * element.size();
        *budget = budget.checked_sub(num_bytes).ok_or_else(|| {
            format!("{}: with it all tensors would take more than {MAX_GROWTH} times the file", shown())
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

    /// The bytes of the `num` elements, last dimension fastest; all places were checked.
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
