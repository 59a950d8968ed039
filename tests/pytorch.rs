//! PyTorch checkpoints: what torch wrote is read to the bit, what is hostile ends in an error and runs nothing.

use std::collections::BTreeMap;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use maskinv::Error;
use maskinv::weights::{TensorFile, read_pytorch};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;
use zip::write::SimpleFileOptions;

/// A tensor in an `expected.json`.
#[derive(Deserialize)]
pub struct Expected {
    dtype: String,
    shape: Vec<usize>,
    /// As text, because reading numbers of JSON may round them.
    values: String,
}

impl Expected {
    fn values(&self) -> Vec<f64> {
        self.values.split_whitespace().map(|v| v.parse().expect("a fixture")).collect()
    }
}

/// What the files in a folder of fixtures hold: file, name, tensor.
pub fn expected(folder: &str) -> BTreeMap<String, BTreeMap<String, Expected>> {
    let text = std::fs::read_to_string(fixture(folder, "expected.json")).expect("a fixture");
    serde_json::from_str(&text).expect("a fixture")
}

pub fn fixture(folder: &str, name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(folder).join(name)
}

fn values(tensor: &Tensor) -> Vec<f64> {
    let tensor = tensor.flatten_all().and_then(|t| t.to_dtype(DType::F64)).and_then(|t| t.to_vec1());
    tensor.expect("every type converts to f64")
}

/// Fails unless `found` holds exactly the expected names, shapes, types and values.
pub fn assert_holds(file: &str, found: &TensorFile, expected: &BTreeMap<String, Expected>) {
    let names: Vec<_> = found.tensors.keys().collect();
    assert_eq!(names, expected.keys().collect::<Vec<_>>(), "{file}");
    for (name, expected) in expected {
        let tensor = &found.tensors[name];
        assert_eq!(
            (tensor.dims(), tensor.dtype().as_str()),
            (&expected.shape[..], &expected.dtype[..]),
            "{file}: {name}"
        );
        assert!(tensor.is_contiguous(), "{file}: {name}");
        assert_eq!(values(tensor), expected.values(), "{file}: {name}");
    }
}

/// Reads bytes as a file.
fn read(bytes: &[u8]) -> Result<TensorFile, Error> {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(bytes).expect("can write");
    read_pytorch(file.path())
}

fn error(bytes: &[u8]) -> String {
    read(bytes).expect_err("must be refused").to_string()
}

fn fixture_bytes(name: &str) -> Vec<u8> {
    std::fs::read(fixture("pytorch", name)).expect("a fixture")
}

fn notes(name: &str) -> Vec<String> {
    read_pytorch(&fixture("pytorch", name)).expect("a valid checkpoint").notes
}

/// A checkpoint in the zip format.
fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        zip.start_file(*name, stored).expect("can write to memory");
        zip.write_all(bytes).expect("can write to memory");
    }
    zip.finish().expect("can write to memory").into_inner()
}

/// A checkpoint with this pickle and a storage of six floats under `0`.
fn with_pickle(pickle: &[u8]) -> Vec<u8> {
    let floats: Vec<u8> = (0..6u8).flat_map(|i| f32::from(i).to_le_bytes()).collect();
    archive(&[("x/data.pkl", pickle), ("x/data/0", &floats)])
}

/// The pickle of `{'w': tensor}`; the numbers are in the text form, which takes any.
fn one_tensor(numel: i64, offset: i64, size: &[i64], stride: &[i64]) -> Vec<u8> {
    let tuple = |ints: &[i64]| format!("({}t", ints.iter().map(|i| format!("I{i}\n")).collect::<String>());
    let storage = format!("(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI{numel}\ntQ");
    let tensor =
        format!("ctorch._utils\n_rebuild_tensor_v2\n({storage}I{offset}\n{}{}I00\nNtR", tuple(size), tuple(stride));
    format!("}}S'w'\n{tensor}s.").into_bytes()
}

/// Made by tests/fixtures/pytorch.py (torch 2.8.0).
#[test]
fn every_checkpoint_reads_as_torch_wrote_it() {
    let expected = expected("pytorch");
    assert_eq!(expected.len(), 20);
    for (file, tensors) in &expected {
        let found = read_pytorch(&fixture("pytorch", file)).unwrap_or_else(|e| panic!("{e}"));
        assert_holds(file, &found, tensors);
    }
}

#[test]
fn notes_say_what_was_taken_and_what_was_left_out() {
    assert!(notes("types.pt").is_empty() && notes("state_dict_legacy.pt").is_empty());
    assert_eq!(notes("nested.pt"), ["tensors taken from state_dict"]);
    assert_eq!(notes("arcface.pt"), ["tensors taken from state_dict_backbone"]);
    let twice =
        ["there are tensors in student too; model / state_dict is used", "tensors taken from model / state_dict"];
    assert_eq!(notes("twice.pt"), twice);
    assert_eq!(
        notes("mixed.pt"),
        ["left out 2 values that are not tensors: epoch (an integer), labels (a numpy._core.multiarray._reconstruct)"]
    );
    assert_eq!(notes("module.pt"), ["tensors taken from a pickled module, a __main__.Net"]);
    assert_eq!(notes("module_legacy.pt"), ["tensors taken from a pickled module, a __main__.Net"]);
    let wrapped = "tensors taken from a pickled module, a torch.nn.parallel.data_parallel.DataParallel";
    assert_eq!(notes("module_in_dict.pt"), [wrapped, "tensors taken from model"]);
}

#[test]
fn equal_views_share_memory() {
    let found = read_pytorch(&fixture("pytorch", "views.pt")).expect("a valid checkpoint");
    let tensor = |name: &str| &found.tensors[name];
    let is_same = |a: &str, b: &str| {
        let (a, b) = (tensor(a).storage_and_layout().0, tensor(b).storage_and_layout().0);
        std::ptr::eq(&raw const *a, &raw const *b)
    };
    assert!(is_same("tied.a", "tied.b"));
    assert!(!is_same("base", "rows"));
}

#[test]
fn what_is_not_supported_is_named() {
    for (file, expected) in [
        ("torchscript.pt", "this is a TorchScript program, not a checkpoint: save its state_dict() in Python"),
        ("plain_pickle.pt", "at byte 0: not a file written by torch.save: expected a zip file or the magic number"),
        ("sparse.pt", "tensor weight: a torch._utils._rebuild_sparse_tensor is not supported, expected a dense tensor"),
        ("complex.pt", "tensor weight: storage 0: its type ComplexFloatStorage is not supported"),
        ("uint16.pt", "tensor weight: a torch._utils._rebuild_tensor_v3 is not supported, expected a dense tensor"),
        ("negated.pt", "tensor weight: its metadata (a lazy negation or conjugation) is not supported"),
        ("meta.pt", "tensor weight: a torch._utils._rebuild_meta_tensor_no_storage is not supported"),
        ("tensor.pt", "no tensors found: the file is one tensor without a name, expected a dict of tensors"),
        (
            "no_tensors.pt",
            "no tensors found: expected a dict of tensors or one with a key such as state_dict, found the keys \
             {epoch: an integer, args: a argparse.Namespace, models: a list of 2}",
        ),
        (
            "bomb.pt",
            "zip entry bomb/data/0: is compressed or encrypted, expected stored bytes as torch.save writes them",
        ),
    ] {
        let path = fixture("pytorch", file);
        let error = read_pytorch(&path).expect_err("must be refused").to_string();
        assert!(error.starts_with(&path.display().to_string()) && error.contains(expected), "{file}: {error}");
    }
    let mut tar = vec![0; 1024];
    tar[257..262].copy_from_slice(b"ustar");
    assert!(error(&tar).contains("this is a tar file written by torch 0.1"));
    assert!(error(b"").contains("not a file written by torch.save"));
    assert!(error(&archive(&[("weights.npy", b"")])).contains("found 0 among 1 entries (weights.npy)"));
}

#[test]
fn big_endian_files_are_refused() {
    let pickle = one_tensor(6, 0, &[6], &[1]);
    let floats = [0; 24];
    let with_order = |order: &[u8]| archive(&[("x/data.pkl", &pickle), ("x/byteorder", order), ("x/data/0", &floats)]);
    assert!(read(&with_order(b"little")).is_ok());
    assert!(error(&with_order(b"big")).contains("expected byte order little, found big"));
    let mut legacy = fixture_bytes("state_dict_legacy.pt");
    let key = b"little_endianq";
    let at = legacy.windows(key.len()).position(|w| w == key).expect("the key is there") + key.len() + 1;
    assert_eq!(legacy[at], 0x88);
    legacy[at] = 0x89;
    assert!(error(&legacy).contains("big-endian"));
}

#[test]
fn hostile_views_are_refused() {
    let read_view = |offset, size: &[i64], stride: &[i64]| read(&with_pickle(&one_tensor(6, offset, size, stride)));
    let found = read_view(1, &[2, 2], &[3, 1]).expect("lies within the storage");
    assert_eq!(values(&found.tensors["w"]), [1.0, 2.0, 4.0, 5.0]);
    assert_eq!(read_view(6, &[0, 9], &[1, 1]).expect("an empty tensor").tensors["w"].dims(), [0, 9]);
    assert_eq!(values(&read_view(2, &[7], &[0]).expect("seven times one value").tensors["w"]), [2.0; 7]);
    let huge = 1 << 62;
    for (offset, size, stride, expected) in [
        (1, &[6][..], &[1][..], "reaches beyond the 6 elements"),
        (huge, &[1], &[1], "reaches beyond the 6 elements"),
        (0, &[2], &[i64::MAX], "reaches beyond the 6 elements"),
        (i64::MAX, &[2], &[i64::MAX], "reaches beyond the 6 elements"),
        (0, &[1 << 20], &[0], "would exceed 4 times the file size"),
        (0, &[1 << 10, 1 << 10], &[0, 0], "would exceed 4 times the file size"),
        (0, &[huge, 4], &[0, 0], "exceeds the address space"),
        (0, &[huge, huge, 0], &[0, 0, 0], "exceeds the address space"),
        (0, &[-1], &[1], "size: expected a non-negative number, found -1"),
        (0, &[2], &[-1], "stride: expected a non-negative number, found -1"),
        (-1, &[2], &[1], "storage offset: expected a non-negative number, found -1"),
        (0, &[2], &[1, 1], "expected as many strides as sizes"),
        (0, &[1; 17], &[1; 17], "size: expected at most 16, found a tuple of 17"),
    ] {
        let error = read_view(offset, size, stride).expect_err("must be refused").to_string();
        assert!(error.contains("tensor w: ") && error.contains(expected), "{error}");
    }
    for numel in [5, 7, -6, 1 << 62] {
        let error = error(&with_pickle(&one_tensor(numel, 0, &[1], &[1])));
        assert!(error.contains(&format!("storage 0: expected {numel} elements of 4 bytes, found 24 bytes")), "{error}");
    }
    let missing = archive(&[("x/data.pkl", &one_tensor(6, 0, &[1], &[1]))]);
    assert!(error(&missing).contains("tensor w: storage 0: is not in the file"));
}

/// A hundred thousand tensors that each want the whole of a storage, at another offset of the strides each time.
#[test]
fn hostile_overlapping_views_are_bounded() {
    let num = 1 << 20;
    let storage = vec![0; num * 4];
    let mut pickle = format!("(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI{num}\ntQp0\n0}}(").into_bytes();
    for i in 0..100_000 {
        let half = num / 2;
        pickle.extend(format!("S'{i}'\nctorch._utils\n_rebuild_tensor\n(g0\nI{i}\n(I{half}\nt(I1\nttR").bytes());
    }
    pickle.extend(b"u.");
    let error = error(&archive(&[("x/data.pkl", &pickle), ("x/data/0", &storage)]));
    assert!(error.contains("all tensors together would exceed 4 times the file size"), "{error}");
}

#[test]
fn hostile_calls_are_not_made() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let marker = folder.path().join("ran");
    let call = format!("cposix\nsystem\n(S'touch {}'\ntR", marker.display());
    let tensor = one_tensor(6, 0, &[1], &[1]);
    let tensor = std::str::from_utf8(&tensor).expect("is text").trim_start_matches("}S'w'\n").trim_end_matches("s.");

    assert!(error(&with_pickle(format!("{call}.").as_bytes())).contains("the file is a posix.system"));
    let found = read(&with_pickle(format!("}}S'w'\n{tensor}sS'x'\n{call}s.").as_bytes())).expect("has a tensor");
    assert_eq!(found.notes, ["left out 1 values that are not tensors: x (a posix.system)"]);
    // What nothing depends on, such as the hooks of a tensor, is not even looked at.
    for (pickle, expected) in [
        (format!("}}S'state_dict'\n{call}s."), "found the keys {state_dict: a posix.system}"),
        (format!("}}S'w'\n{}s.", tensor.replace("I00\nN", &format!("{call}{call}"))), ""),
        (format!("}}S'w'\n{}s.", tensor.replace("ctorch._utils\n_rebuild_tensor_v2\n", &call)), "no tensors found"),
        (format!("}}S'w'\ncnumpy\nload\n({tensor}tRs."), "no tensors found"),
        (format!("}}S'w'\nctorch._utils\n_rebuild_parameter\n({call}tRs."), "a posix.system is not supported"),
        (
            format!("}}S'w'\nctorch._utils\n_rebuild_tensor\n({call}I0\n(t(ttRs."),
            "expected a storage, found a posix.system",
        ),
    ] {
        match read(&with_pickle(pickle.as_bytes())) {
            Ok(_) => assert_eq!(expected, "", "{pickle}"),
            Err(e) => assert!(!expected.is_empty() && e.to_string().contains(expected), "{e}"),
        }
    }
    assert!(!marker.exists(), "a pickle ran a program");
}

#[test]
fn hostile_modules_are_bounded() {
    let module = |inner: &str| format!("ca\nModule\n)R}}(S'_parameters'\n}}S'_buffers'\n}}S'_modules'\n}}({inner}uub");
    // A module in itself.
    let endless = "ca\nModule\n)Rp0\n}(S'_parameters'\n}S'_buffers'\n}S'_modules'\n}S'm'\ng0\nsub.";
    assert!(error(&with_pickle(endless.as_bytes())).contains("contain each other too many times"));
    let deep = (0..70).fold(module(""), |inner, _| module(&format!("S'm'\n{inner}")));
    assert!(error(&with_pickle(format!("{deep}.").as_bytes())).contains("modules are nested deeper than 64"));
    // 2^40 names.
    let mut doubling = module("");
    for _ in 0..40 {
        doubling = module(&format!("S'a'\n{doubling}p0\nS'b'\ng0\n"));
    }
    assert!(error(&with_pickle(format!("{doubling}.").as_bytes())).contains("contain each other too many times"));
    let empty = format!("{}.", module(""));
    assert!(error(&with_pickle(empty.as_bytes())).contains("no tensors found: a a.Module has no parameters"));
    let wrong = format!("{}.", module("S'm'\nI1\n"));
    assert!(error(&with_pickle(wrong.as_bytes())).contains("module m: expected a module, found an integer"));
}

#[test]
fn hostile_dicts_are_bounded() {
    let tensor = one_tensor(6, 0, &[1], &[1]);
    let tensor = std::str::from_utf8(&tensor).expect("is text").trim_end_matches('.');
    let twice = format!("{tensor}{}.", tensor.trim_start_matches('}'));
    assert!(error(&with_pickle(twice.as_bytes())).contains("tensor w occurs twice"));
    let long = tensor.replace("'w'", &format!("'{}'", "w".repeat(2000))) + ".";
    assert!(error(&with_pickle(long.as_bytes())).contains("a name of 2000 bytes, expected at most 1024"));
    let number = tensor.replace("S'w'", "I7") + ".";
    assert!(error(&with_pickle(number.as_bytes())).contains("a tensor has an integer for a name, expected a string"));
    // Dicts in themselves and in each other under keys that are looked into, and very deep ones.
    let keys = ["state_dict", "model", "net", "module", "params"];
    let within: String = keys.map(|key| format!("S'{key}'\ng0\n")).concat();
    let cycle = format!("}}p0\n({within}{}u.", within.repeat(10_000));
    assert!(error(&with_pickle(cycle.as_bytes())).contains("no tensors found"));
    let deep = [&b"}S'model'\n".repeat(100_000)[..], b"N", &b"s".repeat(100_000), b"."].concat();
    assert!(error(&with_pickle(&deep)).contains("found the keys {model: a dict of 1}"));
    let tuples = [&b")"[..], &b"\x85".repeat(1_000_000), b"."].concat();
    assert!(error(&with_pickle(&tuples)).contains("the file is a tuple of 1"));
}

#[test]
fn hostile_archives_are_refused() {
    let pickle = one_tensor(6, 0, &[6], &[1]);
    let good = with_pickle(&pickle);
    // The directory claims that the storage, and everything in it, has four gigabytes.
    let mut forged = good.clone();
    let directory = forged.windows(4).rposition(|w| w == b"PK\x01\x02").expect("the last entry is the storage");
    forged[directory + 20..directory + 28].fill(0xfe);
    let error_forged = error(&forged);
    assert!(error_forged.contains("zip"), "{error_forged}");
    // The end of the directory claims 65535 entries.
    let mut forged = good.clone();
    let end = forged.windows(4).rposition(|w| w == b"PK\x05\x06").expect("there is an end");
    forged[end + 8..end + 12].fill(0xff);
    assert!(error(&forged).contains("not a valid zip file"));
    let two = archive(&[("a/data.pkl", &pickle), ("b/data.pkl", &pickle)]);
    assert!(error(&two).contains("expected one entry data.pkl, found 2"));
}

#[test]
fn hostile_legacy_lengths_are_refused() {
    let good = fixture_bytes("views_legacy.pt");
    assert!(
        read(&[&good[..], b"x"].concat()).expect_err("longer").to_string().contains("1 bytes follow the last storage")
    );
    // The length of the storage of "one", before its first float; storages come in the order of addresses.
    let first = expected("pytorch")["views_legacy.pt"]["one"].values()[0] as f32;
    let place = [&6i64.to_le_bytes()[..], &first.to_le_bytes()].concat();
    let at = good.windows(place.len()).position(|w| w == place).expect("the storage is there");
    let left = good.len() - at - 8;
    for count in [1000, i64::MAX, -1, 1 << 61] {
        let mut forged = good.clone();
        forged[at..at + 8].copy_from_slice(&i64::to_le_bytes(count));
        let error = error(&forged);
        assert!(
            error.contains(&format!("claims {count} elements of 4 bytes, the file has {left} bytes left")),
            "{error}"
        );
    }
}

/// Files of both formats, small enough to be cut and changed at every place.
const SMALL: [&str; 6] =
    ["views.pt", "views_legacy.pt", "parameters_legacy.pt", "module.pt", "python2_legacy.pt", "nested_legacy.pt"];

#[test]
fn hostile_prefixes_are_refused() {
    for name in SMALL {
        let bytes = fixture_bytes(name);
        for end in 0..bytes.len() {
            let Err(error) = read(&bytes[..end]) else { panic!("{name}: the first {end} bytes were accepted") };
            assert!(matches!(error, Error::Format { .. } | Error::Checkpoint { .. }), "{name}: {error}");
        }
    }
}

#[test]
fn hostile_changes_give_an_error_or_tensors_of_bounded_size() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let (mut num_accepted, mut num_refused) = (0, 0);
    for name in SMALL {
        let good = fixture_bytes(name);
        for _ in 0..3000 {
            let mut bytes = good.clone();
            // The directory of a zip file is at its end.
            let from = if rng.random_bool(0.2) { bytes.len() - 200 } else { 0 };
            let at = rng.random_range(from..bytes.len());
            bytes[at] = rng.random();
            match read(&bytes) {
                Err(_) => num_refused += 1,
                Ok(found) => {
                    let size = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
                    let total: usize = found.tensors.values().map(size).sum();
                    assert!(total <= 8 * bytes.len(), "{name}: {total} bytes from {}", bytes.len());
                    num_accepted += 1;
                }
            }
        }
    }
    // Most bytes are padding, data or names: a change there is another valid file.
    assert!(num_accepted > 1000 && num_refused > 1000, "{num_accepted} accepted, {num_refused} refused");
}

/// Made with torch 2.8.0: file, how many tensors, one of the names, its shape and its first value.
const REAL: [(&str, usize, &str, &[usize], f64); 5] = [
    ("foamliu_mobilefacenet.pt", 307, "features.14.conv.2.weight", &[128, 256, 1, 1], 0.019815118983387947),
    ("retinaface_mobilenet0.25_Final.pth", 300, "LandmarkHead.2.conv1x1.weight", &[20, 64, 1, 1], 0.06937550008296967),
    ("mtcnn/pnet.pt", 13, "conv4_2.weight", &[4, 32, 1, 1], -0.0058697802014648914),
    ("mtcnn/rnet.pt", 16, "dense5_2.weight", &[4, 128], -0.1337861865758896),
    ("mtcnn/onet.pt", 21, "dense6_3.weight", &[10, 256], 0.020405491814017296),
];

#[test]
#[ignore = "needs MASKINV_DATA"]
fn needs_data_real_checkpoints_are_read() {
    let data = crate::fixture::data();
    for (file, num, name, shape, first) in REAL {
        let found = read_pytorch(&data.join("models").join(file)).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(found.tensors.len(), num, "{file}: {:?}", found.tensors.keys().take(9).collect::<Vec<_>>());
        let tensor = found.tensors.get(name).unwrap_or_else(|| panic!("{file}: no {name}"));
        assert_eq!(tensor.dims(), shape, "{file}: {name}");
        assert_eq!(values(tensor)[0], first, "{file}: {name}");
        assert!(found.notes.is_empty(), "{file}: {:?}", found.notes);
    }
}
