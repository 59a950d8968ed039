//! Verification files against what Python pickled (tests/fixtures/verification.py), and our own.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use maskinv::data::{DataConfig, Dataset, VerificationFaces, write_verification};
use sha2::{Digest, Sha256};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/verification").join(name)
}

fn digests(set: &dyn Dataset) -> Result<Vec<String>> {
    let digest = |i| {
        let bytes = set.encoded(i)?.context("an encoded image")?;
        Ok(Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect())
    };
    (0..set.len()).map(digest).collect()
}

#[test]
fn every_way_that_python_pickles_them_is_read() -> Result<()> {
    let json: serde_json::Value = serde_json::from_str(&fs::read_to_string(fixture("expected.json"))?)?;
    let images = json["images"].as_array().context("images")?;
    let images: Vec<&str> = images.iter().filter_map(|image| image["sha256"].as_str()).collect();
    assert_eq!(images.len(), 8);
    for name in ["python2", "protocol3", "protocol4", "protocol5", "numpy", "numpy_new", "numpy_issame"] {
        let set = VerificationFaces::open(&fixture(&format!("{name}.bin")))?;
        assert_eq!(digests(&set)?, images, "{name}");
        assert_eq!(set.is_same(), [true, false, true, false], "{name}");
        assert_eq!(set.get(7)?.image.dimensions(), (112, 112));
    }
    Ok(())
}

#[test]
fn a_pickle_that_calls_something_is_refused() {
    let marker = Path::new("/tmp/maskinv-was-here");
    assert!(!marker.exists());
    let error =
        VerificationFaces::open(&fixture("hostile.bin")).map(|_| ()).expect_err("it must be refused").to_string();
    assert!(error.contains("hostile.bin: ") && error.contains("posix.system"), "{error}");
    assert!(!marker.exists());
}

#[test]
fn a_file_cut_off_or_changed_is_an_error_or_other_images() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("cut.bin");
    for name in ["python2", "numpy", "numpy_new"] {
        let bytes = fs::read(fixture(&format!("{name}.bin")))?;
        for len in 0..bytes.len() {
            fs::write(&path, &bytes[..len])?;
            let error = VerificationFaces::open(&path).map(|_| ()).expect_err("cut off").to_string();
            assert!(error.contains("cut.bin: "), "{error}");
        }
        for at in (0..bytes.len()).step_by(7) {
            let mut changed = bytes.clone();
            changed[at] ^= 0x41;
            fs::write(&path, &changed)?;
            if let Ok(set) = VerificationFaces::open(&path) {
                assert_eq!(set.len(), 2 * set.is_same().len());
            }
        }
    }
    Ok(())
}

#[test]
fn pairs_are_written_and_tested_on() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("pairs.bin");
    let set = VerificationFaces::open(&fixture("numpy.bin"))?;
    let expected = digests(&set)?;
    let test = VerificationFaces::open(&fixture("numpy.bin"))?.into_test(2)?;
    assert_eq!(
        test.pairs.iter().map(|p| (p.a, p.b, p.fold)).collect::<Vec<_>>(),
        [(0, 1, 0), (2, 3, 0), (4, 5, 1), (6, 7, 1)]
    );
    write_verification(&set, &test.pairs, &path, &mut |_| Ok(()))?;
    let again = VerificationFaces::open(&path)?;
    assert_eq!((digests(&again)?, again.is_same()), (expected, [true, false, true, false].as_slice()));
    let error = write_verification(&set, &test.pairs, &path, &mut |_| Ok(())).expect_err("it is there").to_string();
    assert!(error.ends_with("exists already"), "{error}");

    let config = DataConfig { pairs: Some(path), ..DataConfig::default() };
    config.validate()?;
    let test = config.open_test()?;
    assert_eq!((test.images.len(), test.pairs.len(), test.num_folds), (8, 4, 4));
    Ok(())
}

#[test]
#[ignore = "needs MASKINV_DATA"]
fn needs_data_insightfaces_file_opens() -> Result<()> {
    let data = crate::fixture::data();
    let set = VerificationFaces::open(&data.join("reference/small_lfw.bin"))?;
    assert_eq!((set.len(), set.is_same()), (20, [true; 10].as_slice()));
    (0..20).try_for_each(|i| set.get(i).map(drop))?;
    let error = set.into_test(10).map(|_| ()).expect_err("all pairs are the same").to_string();
    assert!(error.contains("expected genuine and impostor pairs, found 10 and 0"), "{error}");
    Ok(())
}
