use super::*;

/// Renders a value much as Python prints it, and a value that contains itself as `...`.
fn render(pickle: &Pickle<'_>, id: Id, inside: &mut Vec<Id>) -> String {
    if inside.contains(&id) {
        return "...".to_owned();
    }
    inside.push(id);
    let mut list = |ids: &[Id]| ids.iter().map(|id| render(pickle, *id, inside)).collect::<Vec<_>>().join(" ");
    let text = match (pickle.get(id), pickle.bytes(id), pickle.elements(id)) {
        (_, Some(bytes), _) => format!("b\"{}\"", bytes.escape_ascii()),
        (Value::Tuple(ids), ..) => format!("({})", list(ids)),
        (Value::List(ids), ..) => format!("[{}]", list(ids)),
        (_, _, Some(ids)) => format!("set({})", list(ids)),
        (Value::Object(o), ..) => format!("{}{}", list(&[o.callable]), list(&[o.args])),
        (Value::Dict(items), ..) => {
            let items: Vec<String> = items.iter().map(|(k, v)| format!("{}: {}", list(&[*k]), list(&[*v]))).collect();
            format!("{{{}}}", items.join(" "))
        }
        (Value::None, ..) => "None".to_owned(),
        (Value::Bool(value), ..) => value.to_string(),
        (Value::Int(value), ..) => value.to_string(),
        (Value::Long(bytes), ..) => format!("{bytes:?}"),
        (Value::Float(value), ..) => format!("{value:?}"),
        (Value::Str(text), ..) => format!("{text:?}"),
        (Value::Global(global), ..) => format!("{}.{}", global.module, global.name),
        (Value::PersistentId(id), ..) => format!("<{}>", list(&[*id])),
        (Value::Bytes(_) | Value::Set(_), ..) => unreachable!("have bytes or elements"),
    };
    inside.pop();
    text
}

fn rendered(bytes: &[u8]) -> String {
    let pickle = Pickle::read(bytes).expect("a valid pickle");
    render(&pickle, pickle.root(), &mut Vec::new())
}

fn error(bytes: &[u8]) -> String {
    let PickleError { offset, what } = Pickle::read(bytes).expect_err("must be refused");
    format!("{offset}: {what}")
}

/// Made by tests/fixtures/pickles.py.
const FIXTURES: [(u8, u8, &[u8]); 9] = [
    (2, 0, include_bytes!("../../tests/fixtures/pickles/python2_0.pkl")),
    (2, 1, include_bytes!("../../tests/fixtures/pickles/python2_1.pkl")),
    (2, 2, include_bytes!("../../tests/fixtures/pickles/python2_2.pkl")),
    (3, 0, include_bytes!("../../tests/fixtures/pickles/python3_0.pkl")),
    (3, 1, include_bytes!("../../tests/fixtures/pickles/python3_1.pkl")),
    (3, 2, include_bytes!("../../tests/fixtures/pickles/python3_2.pkl")),
    (3, 3, include_bytes!("../../tests/fixtures/pickles/python3_3.pkl")),
    (3, 4, include_bytes!("../../tests/fixtures/pickles/python3_4.pkl")),
    (3, 5, include_bytes!("../../tests/fixtures/pickles/python3_5.pkl")),
];

#[test]
fn every_protocol_gives_the_same_values() {
    for (python, protocol, bytes) in FIXTURES {
        let b = if python == 2 { "b" } else { "" };
        let (long, minus_long) = ("[0, 0, 0, 0, 0, 0, 0, 0, 64]", "[0, 0, 0, 0, 0, 0, 0, 0, 192]");
        let long = if protocol < 2 { String::new() } else { format!("{long} {minus_long}") };
        let (quotes, module) = if python == 2 { (r#"\'"#, "__builtin__") } else { ("'", "builtins") };
        // Python 3 keeps the names of Python 2 in the protocols that Python 2 can read.
        let module = if protocol < 3 { "__builtin__" } else { module };
        let expected = [
            "[[None true false 0 -1 255 65535 2147483647 2147483648 -1099511627776 1.5 -1e300]".to_owned(),
            format!("[{long}]"),
            format!(
                r#"[{b}"plain" {b}"quote {quotes} \" \\ \n\t" "text é € 😀 \\u \n end" b"bytes \x00\xff\x80 \'" b"""#
            ),
            format!(r#"{b}"{}"]"#, "y".repeat(300)),
            "[() (1) (1 2) (1 2 3) (1 2 3 4)] []".to_owned(),
            format!(r#"{{{b}"key": {{1: 2.5}}}} {{}} set(3)"#),
            format!(r#"[[{b}"shared"] [{b}"shared"] ...] {module}.complex(1.0 2.0)]"#),
        ];
        assert_eq!(rendered(bytes), expected.join(" "), "Python {python}, protocol {protocol}");
        let length = Pickle::read(bytes).map(|p| p.num_bytes()).expect("a valid pickle");
        assert_eq!(&bytes[length..], b"what follows", "Python {python}, protocol {protocol}");
        for end in 0..length {
            Pickle::read(&bytes[..end]).expect_err("ends early");
        }
    }
}

#[test]
fn calls_are_values() {
    assert_eq!(rendered(b"cposix\nsystem\n(S'touch x'\ntR."), r#"posix.system(b"touch x")"#);
    assert_eq!(rendered(b"\x80\x04\x8c\x05posix\x8c\x06system\x93)\x81."), "posix.system()");
    assert_eq!(rendered(b"(iposix\nsystem\n."), "posix.system()");
    assert_eq!(rendered(b"(cposix\nsystem\nK\x01o."), "posix.system(1)");
    assert_eq!(rendered(b"cposix\nsystem\n)}\x92."), "posix.system()");
    assert_eq!(rendered(b"(K\x01K\x02lQPx\n\x86."), r#"(<[1 2]> <b"x">)"#);
    let pickle = Pickle::read(b"ca\nB\n)R}b(K\x01K\x02eK\x03aK\x04K\x05s.").expect("a valid pickle");
    let Value::Object(object) = pickle.get(pickle.root()) else { panic!("{pickle:?}") };
    let ints = |ids: &[Id]| ids.iter().map(|id| pickle.int(*id)).collect::<Vec<_>>();
    assert_eq!(ints(&object.elements), [Some(1), Some(2), Some(3)]);
    assert_eq!(object.items.iter().map(|(k, v)| ints(&[*k, *v])).collect::<Vec<_>>(), [[Some(4), Some(5)]]);
    assert_eq!(pickle.kind(object.state.expect("was given")), "a dict of 0");
    assert_eq!(pickle.kind(pickle.root()), "a a.B");
}

#[test]
fn errors_say_where_and_what() {
    for (bytes, expected) in [
        (&b""[..], "0: expected an opcode: expected 1 more bytes, found 0"),
        (b"N", "1: expected an opcode: expected 1 more bytes, found 0"),
        (b".", "0: opcode 0x2e ('.'): the stack is empty"),
        (b"(.", "1: opcode 0x2e ('.'): the stack is empty"),
        (b"N\xff.", "1: opcode 0xff ('\\xff'): unknown opcode"),
        (b"\x80\x06N.", "0: opcode 0x80 ('\\x80'): expected a protocol of at most 5, found 6"),
        (b"\x80\x04\x95\xff\0\0\0\0\0\0\0N.", "2: opcode 0x95 ('\\x95'): expected 255 more bytes, found 2"),
        (b"B\xff\xff\xff\xffabc.", "0: opcode 0x42 ('B'): expected 4294967295 more bytes, found 4"),
        (
            b"\x8e\xff\xff\xff\xff\xff\xff\xff\xffa.",
            "0: opcode 0x8e ('\\x8e'): expected 18446744073709551615 more bytes, found 2",
        ),
        (b"\x8b\xff\xff\xff\xff.", "0: opcode 0x8b ('\\x8b'): expected 4294967295 more bytes, found 1"),
        (
            b"X\x01\0\0\0\xff.",
            "0: opcode 0x58 ('X'): the string is not UTF-8: invalid utf-8 sequence of 1 bytes from index 0",
        ),
        (b"h\x07.", "0: opcode 0x68 ('h'): no memo entry 7"),
        (b"I12x\n.", "0: opcode 0x49 ('I'): expected an integer of 64 bits, found 12x"),
        (
            b"L1180591620717411303424L\n.",
            "0: opcode 0x4c ('L'): expected an integer of 64 bits, found 1180591620717411303424L",
        ),
        (b"Snothing\n.", "0: opcode 0x53 ('S'): expected a quoted string, found nothing"),
        (b"S'no end", "0: opcode 0x53 ('S'): expected a line, found no line feed"),
        (b"]NNs.", "3: opcode 0x73 ('s'): expected a dict or an object to set items of, found something else"),
        (b"}(Nu.", "3: opcode 0x75 ('u'): expected keys with values, found 1 values"),
        (b"}(NNe.", "4: opcode 0x65 ('e'): expected a list or an object to append to, found something else"),
        (b"N(N\x86.", "3: opcode 0x86 ('\\x86'): expected 2 values on the stack, found 1"),
        (b"t.", "0: opcode 0x74 ('t'): no mark on the stack"),
        (b"(o.", "1: opcode 0x6f ('o'): expected a class, found nothing"),
        (b"ca\nb\nNR.", "6: opcode 0x52 ('R'): expected a tuple of arguments, found something else"),
        (b"ca\nb\n)R}b}b.", "10: opcode 0x62 ('b'): the object already has a state"),
        (b"]}b.", "2: opcode 0x62 ('b'): expected an object to give a state to, found something else"),
        (b"NN\x93.", "2: opcode 0x93 ('\\x93'): expected a module and a name, found something else"),
        (b"\x82\x01.", "0: opcode 0x82 ('\\x82'): extension codes are not supported"),
        (b"\x97.", "0: opcode 0x97 ('\\x97'): out-of-band buffers are not supported"),
    ] {
        assert_eq!(error(bytes), expected, "{}", bytes.escape_ascii());
    }
}

/// 31 lists that would be 10^30 without sharing, and a tuple nested a million deep.
#[test]
fn sharing_and_nesting_cost_nothing() {
    let mut laughs = b"]q\0".to_vec();
    for i in 0..30u8 {
        laughs.push(b'(');
        laughs.extend([b'h', i].repeat(10));
        laughs.extend([b'l', b'q', i + 1]);
    }
    laughs.push(b'.');
    let pickle = Pickle::read(&laughs).expect("a valid pickle");
    assert_eq!((pickle.values().len(), pickle.kind(pickle.root())), (31, "a list of 10".to_owned()));

    let deep = [&b")"[..], &b"\x85".repeat(1_000_000), b"."].concat();
    let pickle = Pickle::read(&deep).expect("a valid pickle");
    assert_eq!((pickle.values().len(), pickle.num_bytes()), (1_000_001, deep.len()));
}

#[test]
fn the_number_of_values_is_bounded() {
    assert!(size_of::<Value>() <= 32);
    let many = b"N".repeat(5_000_000);
    assert_eq!(error(&many), "4194304: opcode 0x4e ('N'): more than 4194304 values");
    // A tuple holds the values from the stack, without the stack's capacity.
    let tuples = [&b"N".repeat(100_000)[..], b"0".repeat(100_000).as_slice(), &b"(t0".repeat(1000), b"N."].concat();
    let pickle = Pickle::read(&tuples).expect("a valid pickle");
    let held = |value: &Value| if let Value::Tuple(ids) = value { ids.capacity() } else { 0 };
    assert_eq!(pickle.values().iter().map(held).sum::<usize>(), 0);
}

#[test]
fn text_in_messages_is_short_and_harmless() {
    assert_eq!(shown("a\n\u{1b}[31m"), r"a\n\u{1b}[31m");
    assert_eq!(shown(&"é".repeat(61)), format!("{}...", "é".repeat(60)));
}
