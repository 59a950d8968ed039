//! Paths as lists write them.

/// Returns a path with forward slashes, without `.` and without folders that a `..` leaves again.
pub(crate) fn plain_path(path: &str) -> String {
    let slashes = path.replace('\\', "/");
    let mut parts: Vec<&str> = Vec::new();
    for part in slashes.split('/').filter(|part| !matches!(*part, "" | ".")) {
        match (part, parts.last()) {
            ("..", Some(&last)) if last != ".." => drop(parts.pop()),
            _ => parts.push(part),
        }
    }
    let root = if slashes.starts_with('/') { "/" } else { "" };
    format!("{root}{}", parts.join("/"))
}

/// Returns the last two parts of a path, by which data sets know an image: `PERSON/IMAGE`; none if there is one part.
pub(crate) fn person_and_file(path: &str) -> Option<String> {
    let plain = plain_path(path);
    let mut parts = plain.rsplit('/');
    let (file, person) = (parts.next()?, parts.next().filter(|person| !person.is_empty())?);
    Some(format!("{person}/{file}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_file_has_one_plain_path() {
        for path in ["a/b.jpg", "./a/b.jpg", "a//b.jpg", "a\\b.jpg", "a/../a/b.jpg", "a/./c/../b.jpg"] {
            assert_eq!(plain_path(path), "a/b.jpg", "{path}");
        }
        assert_eq!(plain_path("/x/../a/b.jpg"), "/a/b.jpg");
        assert_eq!(plain_path("../../a/../b.jpg"), "../../b.jpg");
        assert_eq!(person_and_file("/x/./a\\b.jpg").as_deref(), Some("a/b.jpg"));
        assert_eq!((person_and_file("b.jpg"), person_and_file("/b.jpg")), (None, None));
    }
}
