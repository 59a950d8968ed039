//! One data set in every format: the same images, names and order; and what is refused.

use std::fs;
use std::io::Cursor;
use std::path::Path;

use anyhow::{Context, Result};
use image::{ImageFormat, Rgb, RgbImage};
use maskinv::data::{
    Dataset, Export, FaceFolder, OnBroken, PairList, ShardFaces, open_source, write_folder, write_records, write_shards,
};

/// Three people with six images, of which one is a PNG, one grey, and one has points in its name.
const IMAGES: [&str; 6] = [
    "Ann/Ann_0001.jpg",
    "Ann/Ann_0003.jpg",
    "Bob/Bob_0001.png",
    "Zoe/Z.o.e.jpg",
    "Zoe/Zoe_0001.jpeg",
    "Zoe/Zoe_0002.jpg",
];

fn encoded(number: u32, format: ImageFormat) -> Result<Vec<u8>> {
    let image = RgbImage::from_fn(112, 112, |x, y| Rgb([x as u8 * 2, y as u8 * 2, (40 * number) as u8]));
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format)?;
    Ok(bytes.into_inner())
}

fn folder(root: &Path) -> Result<FaceFolder> {
    for (number, name) in IMAGES.into_iter().enumerate() {
        let path = root.join(name);
        fs::create_dir_all(path.parent().context("a folder")?)?;
        let format = ImageFormat::from_path(name)?;
        fs::write(path, encoded(number as u32, format)?)?;
    }
    Ok(FaceFolder::open(root)?)
}

fn assert_same(found: &dyn Dataset, expected: &dyn Dataset) -> Result<()> {
    assert_eq!((found.len(), found.num_identities()), (expected.len(), expected.num_identities()));
    for i in 0..expected.len() {
        assert_eq!(found.file_name(i), expected.file_name(i));
        assert_eq!(found.identity_name(found.label(i)), expected.identity_name(expected.label(i)));
        assert_eq!(found.encoded(i)?, expected.encoded(i)?, "{}", found.name(i));
        assert_eq!(found.get(i)?, expected.get(i)?);
    }
    Ok(())
}

#[test]
fn every_format_gives_back_what_was_put_in() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let faces = folder(&dir.path().join("faces"))?;
    let mut none = |_: usize| ();
    let mut export = Export::new(&faces, &mut none);
    let [rec, shards, copy] = ["rec/train.rec", "shards", "copy"].map(|name| dir.path().join(name));
    write_records(&mut export, &rec)?;
    write_shards(&mut export, &shards, 4)?;
    write_folder(&mut export, &copy)?;
    assert_eq!(fs::read_dir(&shards)?.count(), 2);
    let mut paths = vec![rec.clone(), rec.with_extension("idx"), dir.path().join("rec"), shards.clone(), copy];
    paths.push(shards.join("faces-{000000..000001}.tar"));
    #[cfg(feature = "parquet")]
    {
        let parquet = dir.path().join("hub/data/train-00000-of-00001.parquet");
        maskinv::data::write_parquet(&mut export, &parquet)?;
        fs::write(parquet.with_file_name("test-00000-of-00001.parquet"), "for something else")?;
        paths.extend([parquet, dir.path().join("hub")]);
    }
    for path in paths {
        let source = open_source(&path)?;
        assert_same(source.images.as_ref(), &faces).with_context(|| path.display().to_string())?;
        assert!(source.to_string().contains("6 images of 3 people"), "{source}");
    }
    Ok(())
}

#[test]
fn lists_name_files_and_people() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let faces = folder(&dir.path().join("faces"))?;
    let lines = |line: &dyn Fn(usize, u32, &str) -> String| {
        IMAGES.iter().enumerate().map(|(i, name)| line(i, faces.label(i), name) + "\n").collect::<String>()
    };
    let person = |label| faces.identity_name(label);
    let lists = [
        ("a.txt", lines(&|_, label, name| format!("faces/{name} {label}"))),
        ("b.csv", format!("file,person\n{}", lines(&|_, label, name| format!("faces/{name}, {}", person(label))))),
        ("c.tsv", lines(&|_, label, name| format!("faces/{name}\t{label}"))),
        ("d.lst", lines(&|i, label, name| format!("{i}\t{label}.000000\tfaces/{name}"))),
        // insightface's, with a box and landmarks too; label first; labels as pandas writes them; the folder as label.
        ("f.lst", lines(&|_, label, name| format!("1\tfaces/{name}\t{label}"))),
        ("g.lst", lines(&|_, label, name| format!("0\tfaces/{name}\t{label}\t1\t2\t3\t4"))),
        ("h.txt", lines(&|_, label, name| format!("{label} faces/{name}"))),
        ("i.csv", format!(",label,path\n{}", lines(&|i, label, name| format!("{i},{label}.0,\"faces/{name}\"")))),
        ("j.csv", format!("label,path,split\r\n{}", lines(&|_, label, name| format!("{label},faces/{name},train\r")))),
        ("k.txt", lines(&|_, _, name| format!("./faces\\{}", name.replace('/', "\\")))),
        ("l.csv", lines(&|_, label, name| format!("faces/{name};{label}"))),
        ("n.txt", format!("path\n{}", lines(&|_, _, name| format!("faces/{name}")))),
        ("o.txt", format!("# faces\n{}", lines(&|_, label, name| format!("\"faces/{name}\" {label}")))),
        ("m.txt", format!("{}\n{}", IMAGES.len(), lines(&|_, label, name| format!("faces/{name} {label}")))),
    ];
    for (name, text) in lists {
        let path = dir.path().join(name);
        fs::write(&path, text)?;
        let source = open_source(&path).context(name)?;
        assert_same(source.images.as_ref(), &faces).context(name)?;
        assert!(source.notes.is_empty(), "{name}: {:?}", source.notes);
    }
    let twice = dir.path().join("twice.txt");
    let all = lines(&|_, label, name| format!("faces/{name} {label}"));
    fs::write(&twice, format!("{all}faces/{} {}\n", IMAGES[1], faces.label(1)))?;
    let source = open_source(&twice)?;
    assert_same(source.images.as_ref(), &faces)?;
    assert!(source.to_string().ends_with("; 1 lines repeat an earlier one and are left out"), "{source}");
    fs::write(dir.path().join("faces/first.gif"), "")?;
    let first = format!("faces/{} 0\n", IMAGES[0]);
    for (text, expected) in [
        (format!("{first}faces/Ann/Ann_0009.jpg 0\n"), "e.txt:2: expected an image "),
        (format!("{first}nothing\n"), "e.txt:2: expected an image's path and its label, found \"nothing\""),
        (format!("{first}faces/x.doc 0\n"), "e.txt:2: expected an image's path and its label"),
        (format!("{first}faces/{}\n", IMAGES[1]), "e.txt:2: expected a label of "),
        (format!("faces/first.gif 0\n{first}"), "e.txt:1: expected the path of an image, found \"faces/first.gif\""),
        (format!("{first}faces/{} 1\n", IMAGES[0]), "e.txt:2: expected one label of faces/"),
        (format!("faces/{0} faces/{0}\n", IMAGES[0]), "a list of pairs is given as --pairs"),
        ("what,is\n".to_owned(), "e.txt:1: expected column names such as path,label"),
        ("path,split\nx.jpg,a\n".to_owned(), "expected a column of labels, such as label"),
        // Two people of one name, if what follows the comma were dropped.
        (format!("path,person\nfaces/{},Doe, Jane\n", IMAGES[0]), "e.txt:2: expected 2 fields, found 3"),
        (format!("{}faces/{}\t0\t1\n", first.replace(' ', "\t"), IMAGES[1]), "e.txt:2: expected 2 fields, found 3"),
        ("path,label\n\"a.jpg,0\n".to_owned(), "e.txt:2: expected every quote to be closed"),
        ("7\na.jpg 1\n".to_owned(), "e.txt:1: expected 7 lines to follow, found 1"),
        (String::new(), "e.txt:1: expected column names such as path,label"),
    ] {
        let path = dir.path().join("e.txt");
        fs::write(&path, &text)?;
        let error = open_source(&path).map(|_| ()).expect_err(&text).to_string();
        assert!(error.contains(expected), "{text:?}: {error}");
    }
    Ok(())
}

#[test]
fn shards_of_others_are_read() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("other.tar");
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |name: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, bytes)
    };
    // The label before the image, as JSON, with other members and a file that is no sample.
    add("README", b"hello")?;
    add("./0001.json", br#"{"label": 17, "age": 40}"#)?;
    add("./0001.jpg", &encoded(1, ImageFormat::Jpeg)?)?;
    add("./0001.npy", b"...")?;
    add("./0002.png", &encoded(2, ImageFormat::Png)?)?;
    add("./0002.cls", b"4\n")?;
    add("./0003.txt", b"no image")?;
    fs::write(&path, builder.into_inner()?)?;
    let set = open_source(&path)?.images;
    assert_eq!((set.len(), set.num_identities(), set.label(0), set.label(1)), (2, 2, 1, 0));
    assert_eq!((set.identity_name(0), set.identity_name(1)), ("4".to_owned(), "17".to_owned()));
    assert_eq!(set.file_name(1).as_deref(), Some("0002.png"));
    set.get(1)?;
    Ok(())
}

#[test]
fn images_whose_names_differ_in_the_extension_alone_stay_apart() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let person = dir.path().join("faces/a");
    fs::create_dir_all(&person)?;
    for (number, name) in (0..).zip(["x.jpg", "x.png", "y.jpg"]) {
        let format = if name.ends_with("png") { ImageFormat::Png } else { ImageFormat::Jpeg };
        fs::write(person.join(name), encoded(number, format)?)?;
    }
    let faces = FaceFolder::open(dir.path().join("faces"))?;
    let shards = dir.path().join("shards");
    write_shards(&mut Export::new(&faces, &mut |_| ()), &shards, 100)?;
    assert_same(open_source(&shards)?.images.as_ref(), &faces)?;
    // As PNG both would be x.png.
    image::open(person.join("x.jpg"))?.save(person.join("x.bmp"))?;
    let faces = FaceFolder::open(dir.path().join("faces"))?;
    let copy = dir.path().join("copy");
    let error = write_folder(&mut Export::new(&faces, &mut |_| ()), &copy).expect_err("twice").to_string();
    assert!(error.contains("a file name of its own for each image, found a/x.png twice") && !copy.exists(), "{error}");
    Ok(())
}

#[test]
fn broken_shards_are_refused_or_shorter() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let faces = folder(&dir.path().join("faces"))?;
    write_shards(&mut Export::new(&faces, &mut |_| ()), &dir.path().join("shards"), 100)?;
    let path = dir.path().join("shards/faces-000000.tar");
    let bytes = fs::read(&path)?;
    let file = fs::OpenOptions::new().write(true).open(&path)?;
    let paths = std::slice::from_ref(&path);
    let closed = (bytes.iter().rposition(|&byte| byte != 0).unwrap_or(0) + 1).next_multiple_of(512) as u64 + 1024;
    let mut kept = std::collections::BTreeSet::new();
    for len in (0..bytes.len() as u64).rev() {
        file.set_len(len)?;
        // Beyond the two closing blocks tar files are padded.
        if len >= closed {
            assert_eq!(ShardFaces::open(paths, OnBroken::Fail)?.len(), faces.len(), "{len}");
            continue;
        }
        let error = ShardFaces::open(paths, OnBroken::Fail).map(|_| ()).expect_err("cut").to_string();
        assert!(error.contains("faces-000000.tar"), "{len}: {error}");
        // No sample before the last one, or even no header.
        let Ok(set) = ShardFaces::open(paths, OnBroken::Skip) else { continue };
        kept.insert(set.len());
        assert!(set.cut().len() == 1 && set.cut()[0].contains("truncated"), "{len}: {:?}", set.cut());
        for i in 0..set.len() {
            assert_eq!(set.encoded(i)?, faces.encoded(i)?, "{len}");
            assert_eq!(set.person_and_file(i), faces.person_and_file(i), "{len}");
        }
    }
    assert_eq!(kept, (1..faces.len()).collect(), "every number of samples that are surely complete");
    // Two archives as one file: the second would be lost.
    fs::write(&path, [&bytes[..], &bytes].concat())?;
    let error = ShardFaces::open(paths, OnBroken::Fail).map(|_| ()).expect_err("joined").to_string();
    assert!(error.contains("expected nothing after the end of the archive"), "{error}");
    let first = ShardFaces::open(paths, OnBroken::Skip)?;
    assert_eq!((first.len(), first.cut().len()), (faces.len(), 1));
    // A member's header in which a byte has changed.
    let mut damaged = bytes.clone();
    let second = damaged.windows(5).rposition(|word| word == b"ustar").context("a header")?;
    damaged[second] ^= 1;
    fs::write(&path, &damaged)?;
    let error = ShardFaces::open(paths, OnBroken::Fail).map(|_| ()).expect_err("damaged").to_string();
    assert!(error.contains("expected a member's header, found something else"), "{error}");
    fs::write(&path, [&[0x1f, 0x8b, 8][..], &[7; 600]].concat())?;
    let error = open_source(&path).map(|_| ()).expect_err("compressed").to_string();
    assert!(error.contains("expected a tar file that is not compressed, found gzip data"), "{error}");
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(3);
    builder.append_data(&mut header, "a/b.jpg", &b"abc"[..])?;
    fs::write(&path, builder.into_inner()?)?;
    let error = open_source(&path).map(|_| ()).expect_err("no label").to_string();
    assert!(error.contains("expected the label of a/b.jpg in a/b.cls or a/b.json beside it, found none"), "{error}");
    Ok(())
}

#[test]
#[cfg(feature = "parquet")]
fn broken_parquet_is_refused_or_other_data() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let faces = folder(&dir.path().join("faces"))?;
    let path = dir.path().join("x.parquet");
    maskinv::data::write_parquet(&mut Export::new(&faces, &mut |_| ()), &path)?;
    let bytes = fs::read(&path)?;
    let read = || {
        open_source(&path).and_then(|source| (0..source.images.len()).try_for_each(|i| source.images.get(i).map(drop)))
    };
    for len in (0..bytes.len()).step_by(97) {
        fs::write(&path, &bytes[..len])?;
        let error = read().expect_err("cut off").to_string();
        assert!(error.contains("x.parquet: parquet: "), "{error}");
    }
    let mut refused = 0;
    for at in (0..bytes.len()).step_by(31) {
        let mut changed = bytes.clone();
        changed[at] ^= 0x15;
        fs::write(&path, &changed)?;
        refused += usize::from(read().is_err());
    }
    assert!(refused > 10, "{refused}");
    Ok(())
}

#[test]
fn what_is_no_data_set_is_said_to_be_none() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let refused = |path: &Path, expected: &str| {
        let error = open_source(path).map(|_| ()).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    };
    refused(&dir.path().join("missing"), "expected a data set, found nothing there");
    refused(&dir.path().join("missing.rec"), "missing.rec");
    fs::write(dir.path().join("a.doc"), "")?;
    refused(&dir.path().join("a.doc"), "found .doc");
    refused(&dir.path().join("lfw.bin"), "give it as --pairs");
    for name in ["a.rec", "b.rec"] {
        fs::write(dir.path().join(name), "")?;
    }
    refused(dir.path(), "expected one data set, found 2 .rec, 0 .tar and 0 .parquet files");
    refused(&dir.path().join("a.rec"), "expected records, found none");
    Ok(())
}

#[test]
fn images_without_names_are_counted_for_lists_of_pairs() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let faces = folder(&dir.path().join("faces"))?;
    let rec = dir.path().join("train.rec");
    write_records(&mut Export::new(&faces, &mut |_| ()), &rec)?;
    fs::remove_file(rec.with_extension("lst"))?;
    let list = dir.path().join("pairs.txt");
    fs::write(&list, "0 1 2\n0 2 2 3\n")?;
    let pairs = PairList::read(&list)?.resolve(open_source(&rec)?.images.as_ref())?;
    assert_eq!(pairs.iter().map(|p| (p.a, p.b, p.is_same)).collect::<Vec<_>>(), [(0, 1, true), (1, 5, false)]);
    Ok(())
}
