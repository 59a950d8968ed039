//! The default run of `maskinv train`, beside what README.md shows of it.

use anyhow::{Context, Result};

use crate::cli::{maskinv, stdout, str};

/// Points of EER by which another processor's rounding may move a student.
const STUDENT: f64 = 2.5;
/// The same for MaskInv-LG, which seeds move twice as far as the others (docs/results.md).
const LG: f64 = 4.0;
/// The same for the teacher, whose weights are given.
const TEACHER: f64 = 0.3;

/// The names and EERs of the rows of a printed table: three settings of four figures each.
fn rows(text: &str) -> Vec<(String, [f64; 3])> {
    let row = |line: &str| {
        let cells: Vec<&str> = line.split('|').collect();
        let eer = |cell: &str| cell.split_whitespace().next()?.trim_end_matches('*').parse().ok();
        match cells[..] {
            [name, uu, um, mm] => Some((name.trim().to_owned(), [eer(uu)?, eer(um)?, eer(mm)?])),
            _ => None,
        }
    };
    text.lines().filter_map(row).collect()
}

#[test]
#[ignore = "heavy: it trains for minutes; .ci/run runs it"]
fn heavy_the_demonstration_prints_what_the_readme_shows() -> Result<()> {
    let readme = include_str!("../README.md");
    let shown =
        readme.split("```text\n").nth(1).and_then(|rest| rest.split("```").next()).context("a block of text")?;
    let folder = tempfile::tempdir()?;
    let printed = stdout(&maskinv(&["train", "--quiet", "--out", str(&folder.path().join("out"))])?);
    let (shown_rows, printed_rows) = (rows(shown), rows(&printed));
    assert_eq!(shown_rows.len(), 5, "{shown}");
    assert_eq!(printed_rows.len(), 5, "{printed}");
    for ((name, shown), (found, printed)) in shown_rows.iter().zip(&printed_rows) {
        assert_eq!(name, found);
        let tolerance = match name.as_str() {
            "MaskInv-LG" => LG,
            name if name.starts_with("teacher") => TEACHER,
            _ => STUDENT,
        };
        for (a, b) in shown.iter().zip(printed) {
            assert!((a - b).abs() <= tolerance, "{name}: README shows {shown:?}, the command printed {printed:?}");
        }
    }
    for text in [shown, &printed] {
        let verdict = text.lines().find(|line| line.starts_with("MaskInv-HG is ")).context("a verdict on HG")?;
        assert!(verdict.contains("better on U-M") && verdict.contains("better on M-M"), "{verdict}");
    }
    Ok(())
}
