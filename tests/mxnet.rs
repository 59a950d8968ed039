//! MXNet parameters: what MXNet wrote is read to the bit, and what is cut, changed or forged ends in an error.

use std::io::Write;

use maskinv::Error;
use maskinv::weights::{TensorFile, read_mxnet_params};

use crate::pytorch::{assert_holds, expected, fixture};

const FOLDER: &str = "mxnet_params";

fn read(bytes: &[u8]) -> Result<TensorFile, Error> {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(bytes).expect("can write");
    read_mxnet_params(file.path())
}

fn error(bytes: &[u8]) -> String {
    read(bytes).expect_err("must be refused").to_string()
}

fn bytes(name: &str) -> Vec<u8> {
    std::fs::read(fixture(FOLDER, name)).expect("a fixture")
}

/// Made by tests/fixtures/mxnet_params.py (mxnet 1.9.1).
#[test]
fn every_version_reads_as_mxnet_wrote_it() {
    let expected = expected(FOLDER);
    assert_eq!(expected.len(), 5);
    for (file, tensors) in &expected {
        let found = read_mxnet_params(&fixture(FOLDER, file)).unwrap_or_else(|e| panic!("{e}"));
        assert_holds(file, &found, tensors);
        assert!(found.notes.is_empty() && found.metadata.is_empty(), "{file}");
    }
}

#[test]
fn hostile_parameters_are_refused() {
    let refused = |name| error(&bytes(name));
    assert!(refused("sparse.params").contains("array 0 of 1: storage type 1 is sparse or unknown, expected 0 (dense)"));
    assert!(refused("no_names.params").contains("expected 1 names, one per array, found 0"));
    let good = bytes("v1.params");
    let forge = |at: usize, with: &[u8]| {
        let mut forged = good.clone();
        forged[at..at + with.len()].copy_from_slice(with);
        error(&forged)
    };
    // The list's header, then the first array: magic number, dimensions, two sizes, device, type.
    assert!(forge(0, &[0x13]).contains("at byte 0: MXNet parameters: magic number 0x113, expected 0x112"));
    assert!(forge(16, &[0xff; 8]).contains(" of 18446744073709551615: "));
    assert!(forge(24, &[0xff]).contains("expected at most 32 dimensions or a version, found 4187224831"));
    assert!(forge(28, &[33]).contains("expected at most 32 dimensions or a version, found 33"));
    assert!(forge(32, &[0xff; 16]).contains("exceeds the address space"));
    assert!(forge(32, &[0, 0, 0, 0, 1]).contains("expected 51539607552 bytes of the elements, found"));
    assert!(forge(56, &[12]).contains("element type 12 is not supported, expected 0 to 7"));
    assert!(error(&[&good[..], b"x"].concat()).contains("1 bytes follow the last name, expected none"));
    let name = good.len() - 1;
    assert!(forge(name, b"a").contains("two arrays are named a"));
    assert!(forge(name - 8, &[0xff; 8]).contains("expected 18446744073709551615 bytes of a name, found 1"));
}

#[test]
fn arrays_without_data_are_noted() {
    let mut empty = bytes("no_names.params");
    // The one array: no dimension, and nothing after it; then a name.
    empty.truncate(32);
    empty.extend([0u32.to_le_bytes().as_slice(), &1u64.to_le_bytes(), &1u64.to_le_bytes(), b"a"].concat());
    let found = read(&empty).expect("a valid file");
    assert!(found.tensors.is_empty());
    assert_eq!(found.notes, ["array a has no data and is left out"]);
}

#[test]
fn hostile_parameter_prefixes_and_changes_do_not_panic() {
    for name in ["v3.params", "v1.params", "first.params", "prefixes.params"] {
        let good = bytes(name);
        for end in 0..good.len() {
            assert!(matches!(read(&good[..end]), Err(Error::Format { .. })), "{name}: the first {end} bytes");
        }
        let mut num_refused = 0;
        for at in 0..good.len() {
            for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
                let mut changed = good.clone();
                changed[at] = value;
                num_refused += usize::from(read(&changed).is_err());
            }
        }
        assert!(num_refused > 50, "{name}: {num_refused}");
    }
}
