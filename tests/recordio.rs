//! RecordIO against what MXNet wrote and read (tests/fixtures/recordio.py), broken files, and our own.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use maskinv::data::{Dataset, Export, IdentityFilter, RecordFaces, Subset, write_index, write_records};
use serde_json::Value;
use sha2::{Digest, Sha256};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/recordio").join(name)
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The records of a file that are images, as MXNet reads them, and their labels, by key.
fn expected(name: &str) -> Result<Vec<(u64, String)>> {
    let json: Value = serde_json::from_str(&fs::read_to_string(fixture("expected.json"))?)?;
    let records = json[name].as_array().context("a list of records")?;
    let image = |record: &&Value| record["payload_len"] != 0;
    let record = |record: &Value| {
        let label = record["label"][0].as_f64().context("a label")?;
        Ok((label as u64, record["payload_sha256"].as_str().context("a digest")?.to_owned()))
    };
    records.iter().filter(image).map(record).collect()
}

fn found(set: &dyn Dataset) -> Result<Vec<(u64, String)>> {
    let image = |i| {
        let bytes = set.encoded(i)?.context("an encoded image")?;
        Ok((set.identity_name(set.label(i)).parse()?, sha256(&bytes)))
    };
    (0..set.len()).map(image).collect()
}

/// A copy of a fixture without its index.
fn without_index(name: &str) -> Result<(tempfile::TempDir, PathBuf)> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join(format!("{name}.rec"));
    fs::copy(fixture(&format!("{name}.rec")), &path)?;
    Ok((dir, path))
}

#[test]
fn records_are_what_mxnet_reads() -> Result<()> {
    for (name, num_images, num_identities) in
        [("faces", 7, 3), ("multi_label", 7, 3), ("plain", 5, 3), ("split", 11, 0)]
    {
        let set = RecordFaces::open(&fixture(&format!("{name}.rec")))?;
        assert_eq!(set.len(), num_images, "{name}");
        assert_eq!(found(&set)?, expected(name)?, "{name}");
        let (_dir, path) = without_index(name)?;
        assert_eq!(found(&RecordFaces::open(&path)?)?, expected(name)?, "{name} without its index");
        if num_identities > 0 {
            assert_eq!(set.num_identities(), num_identities, "{name}");
            let sample = set.get(num_images - 1)?;
            assert_eq!((sample.image.dimensions(), sample.label), ((112, 112), set.label(num_images - 1)));
        }
    }
    Ok(())
}

#[test]
fn an_index_is_rebuilt_as_it_was() -> Result<()> {
    // The ids in `split` are not all keys.
    for name in ["faces", "multi_label", "plain"] {
        let (_dir, path) = without_index(name)?;
        let (index, num_records) = write_index(&path)?;
        let lines = |path: &Path| -> Result<Vec<String>> {
            let mut lines: Vec<String> = fs::read_to_string(path)?.lines().map(str::to_owned).collect();
            lines.sort();
            Ok(lines)
        };
        assert_eq!(num_records, lines(&index)?.len());
        assert_eq!(lines(&index)?, lines(&fixture(&format!("{name}.idx")))?, "{name}");
        assert_eq!(found(&RecordFaces::open(&path)?)?, expected(name)?);
    }
    Ok(())
}

#[test]
fn a_file_cut_off_anywhere_is_an_error_or_has_fewer_images() -> Result<()> {
    for name in ["faces", "plain", "split"] {
        let bytes = fs::read(fixture(&format!("{name}.rec")))?;
        let index = fs::read(fixture(&format!("{name}.idx")))?;
        let (mut errors, mut shorter) = (0, 0);
        for with_index in [false, true] {
            let dir = tempfile::tempdir()?;
            let path = dir.path().join("cut.rec");
            if with_index {
                fs::write(path.with_extension("idx"), &index)?;
            }
            let whole = expected(name)?;
            fs::write(&path, &bytes)?;
            let file = fs::OpenOptions::new().write(true).open(&path)?;
            for len in (0..bytes.len() as u64).rev() {
                file.set_len(len)?;
                match RecordFaces::open(&path).map_err(anyhow::Error::from).and_then(|set| found(&set)) {
                    Ok(images) => {
                        // The last bytes may be padding.
                        let is_shorter = images.len() < whole.len() || len + 3 >= bytes.len() as u64;
                        assert!(is_shorter && whole.starts_with(&images), "{name} cut at {len}");
                        shorter += 1;
                    }
                    Err(error) => {
                        assert!(error.to_string().contains("cut."), "{error}");
                        errors += 1;
                    }
                }
            }
        }
        assert!(errors > bytes.len() && errors + shorter == 2 * bytes.len(), "{name}: {errors}, {shorter}");
    }
    Ok(())
}

#[test]
fn a_byte_changed_anywhere_never_panics() -> Result<()> {
    let (dir, path) = without_index("faces")?;
    let bytes = fs::read(&path)?;
    let mut refused = 0;
    for at in (0..bytes.len()).step_by(3) {
        for value in [0, 0xff, bytes[at] ^ 0x40] {
            let mut changed = bytes.clone();
            changed[at] = value;
            fs::write(&path, &changed)?;
            let result = RecordFaces::open(&path).and_then(|set| (0..set.len()).try_for_each(|i| set.get(i).map(drop)));
            refused += usize::from(result.is_err());
        }
    }
    assert!(refused > 100, "{refused}");
    drop(dir);
    Ok(())
}

#[test]
fn an_index_of_another_file_is_an_error_and_a_list_is_not_used() -> Result<()> {
    let (_dir, path) = without_index("faces")?;
    let refused = |index: &str, expected: &str| -> Result<()> {
        fs::write(path.with_extension("idx"), index)?;
        let error = RecordFaces::open(&path).map(|_| ()).expect_err(index).to_string();
        assert!(error.contains(expected), "{error}");
        Ok(())
    };
    refused("", "expected records, found none")?;
    refused("0\t0\n1 x\n", "faces.idx:2: expected a key and an offset, found \"1 x\"")?;
    refused("0\t0\n1\t99999999\n", "faces.idx:2: expected an offset in ")?;
    refused("5\t4\n", "at byte 4: expected the start of a record, 0xced7230a, found ")?;
    refused("0\t0\n1\t44\n2\t88\n", "expected")?;
    fs::copy(fixture("faces.idx"), path.with_extension("idx"))?;
    fs::write(path.with_extension("lst"), "1\t0\ta/1.jpg\n3\t0\ta/2.jpg\n")?;
    let faces = RecordFaces::open(&path)?;
    assert!(
        faces.note().is_some_and(|note| note.contains("faces.lst does not fit and is not used")),
        "{:?}",
        faces.note()
    );
    Ok(())
}

#[test]
fn what_is_written_is_what_mxnet_wrote() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let set = RecordFaces::open(&fixture("faces.rec"))?;
    let path = dir.path().join("again.rec");
    let mut done = 0;
    write_records(&mut Export::new(&set, &mut |num| done = num), &path)?;
    assert_eq!(done, 7);
    assert_eq!(fs::read(&path)?, fs::read(fixture("faces.rec"))?);
    assert_eq!(fs::read_to_string(path.with_extension("idx"))?, fs::read_to_string(fixture("faces.idx"))?);
    assert_eq!(fs::read_to_string(dir.path().join("property"))?, "3,112,112\n");
    let again = RecordFaces::open(&path)?;
    assert_eq!(
        found(&again)?.iter().map(|f| &f.1).collect::<Vec<_>>(),
        expected("faces")?.iter().map(|e| &e.1).collect::<Vec<_>>()
    );
    assert_eq!((again.identity_name(2).as_str(), again.file_name(6).as_deref()), ("2", Some("2_0002.jpg")));

    let error = write_records(&mut Export::new(&set, &mut |_| ()), &path).expect_err("it is there").to_string();
    assert!(error.ends_with("exists already"), "{error}");

    // Images of a person apart: no records of people.
    let mixed = RecordFaces::open(&fixture("plain.rec"))?;
    let path = dir.path().join("mixed").join("plain.rec");
    write_records(&mut Export::new(&mixed, &mut |_| ()), &path)?;
    assert_eq!(found(&RecordFaces::open(&path)?)?, expected("plain")?);
    assert_eq!(fs::read(&path)?, fs::read(fixture("plain.rec"))?);
    Ok(())
}

#[test]
fn a_write_that_fails_leaves_nothing() -> Result<()> {
    let (dir, path) = without_index("faces")?;
    let set = Arc::new(RecordFaces::open(&path)?);
    let part = Subset::new(set, &IdentityFilter::default(), &path)?;
    let file = fs::OpenOptions::new().write(true).open(&path)?;
    file.set_len(4000)?;
    let out = dir.path().join("out");
    let error =
        write_records(&mut Export::new(&part, &mut |_| ()), &out.join("x.rec")).expect_err("cut off").to_string();
    assert!(error.contains("faces.rec"), "{error}");
    assert!(!out.exists());

    let set = RecordFaces::open(&fixture("faces.rec"))?;
    let (stop, mut none) = (AtomicBool::new(true), |_: usize| ());
    let mut export = Export::new(&set, &mut none).stopped_by(&stop);
    let error = write_records(&mut export, &out.join("x.rec")).expect_err("stopped").to_string();
    assert!(error.contains("interrupted"), "{error}");
    assert!(!out.exists());
    Ok(())
}

#[test]
fn lists_beside_records_are_used_where_they_fit() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let rec = dir.path().join("train.rec");
    fs::copy(fixture("faces.rec"), &rec)?;
    fs::copy(fixture("faces.idx"), rec.with_extension("idx"))?;
    let plain = RecordFaces::open(&rec)?;
    assert!(plain.file_name(0).is_none() && plain.note().is_none());
    let (num, list) = (plain.len(), rec.with_extension("lst"));
    let lines =
        |line: &dyn Fn(usize, u32) -> String| (0..num).map(|i| line(i, plain.label(i)) + "\n").collect::<String>();
    let mut shuffled: Vec<String> =
        (0..num).map(|i| format!("{}\t{}.000000\tx/{i}.jpg", i + 1, plain.label(i))).collect();
    shuffled.reverse();
    for text in [
        lines(&|i, label| format!("{}\t{label}\tx/{i}.jpg", i + 1)),
        // More columns; in another order, with a line of an image that is not packed.
        lines(&|i, label| format!("{}\t{label}\t0\t1\tx/{i}.jpg", i + 1)),
        format!("{}\n9999\t3\tx/none.jpg\n", shuffled.join("\n")),
        // insightface's, whose labels may be numbered in another way.
        lines(&|i, label| format!("1\t/data/x/{i}.jpg\t{}", label + 7)),
    ] {
        fs::write(&list, &text)?;
        let faces = RecordFaces::open(&rec)?;
        assert_eq!(faces.note(), None, "{text}");
        let names: Vec<_> = (0..num).filter_map(|i| faces.file_name(i)).collect();
        assert_eq!(names, (0..num).map(|i| format!("{i}.jpg")).collect::<Vec<_>>(), "{text}");
    }
    for (text, words) in [
        ("what is this?\n".to_owned(), "expected key, label and path"),
        (lines(&|i, _| format!("1\tx/{i}.jpg\t{i}")), "its label is not that of the record"),
        ("1\tx/0.jpg\t0\n".to_owned(), "expected a line for each of "),
        (lines(&|i, label| format!("{}\t{}\tx/{i}.jpg", i + 1, label + 1)), "expected the record's label"),
        (lines(&|i, label| format!("{}\t{label}\tx/0.jpg", i + 1)), "a path of its own for each image"),
        (
            lines(&|i, label| format!("{}\t{label}\t{}x/{}.jpg", i + 1, if i == 2 { "./" } else { "" }, i % 2 + i / 3)),
            "a path of its own for each image",
        ),
        (lines(&|i, label| format!("{}\t{label}\tx/{i}.jpg", i + 1)) + "1\t0\tx/a.jpg\n", "expected each key once"),
    ] {
        fs::write(&list, &text)?;
        let faces = RecordFaces::open(&rec)?;
        assert!(
            faces.note().is_some_and(|note| note.contains("is not used") && note.contains(words)),
            "{:?}",
            faces.note()
        );
        assert_eq!((faces.len(), faces.file_name(0)), (num, None));
    }
    Ok(())
}
