//! What templates can call.

use std::fmt::Write as _;

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

use super::{is_true, printed};

/// As wide as a cell may be.
const WIDTH_MAX: usize = 1024;

/// Their names.
pub(super) const FUNCTIONS: [&str; 23] = [
    "and", "eq", "ge", "gt", "index", "join", "json", "le", "len", "lower", "lt", "ne", "not", "or", "pad", "print",
    "printf", "println", "slice", "split", "title", "truncate", "upper",
];

/// What a function makes of its arguments.
pub(super) fn call(name: &str, arguments: &[Value]) -> anyhow::Result<Value> {
    let text = |index: usize| arguments.get(index).map(printed).unwrap_or_default();
    let number = |index: usize| arguments.get(index).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
    Ok(match (name, arguments) {
        ("json", [value]) => json!(value.to_string()),
        ("upper", [_]) => json!(text(0).to_uppercase()),
        ("lower", [_]) => json!(text(0).to_lowercase()),
        ("title", [_]) => json!(title(&text(0))),
        ("split", [_, _]) => text(0).split(&text(1)).collect(),
        ("join", [Value::Array(list), _]) => json!(list.iter().map(printed).collect::<Vec<_>>().join(&text(1))),
        ("join", [Value::Null, _]) => json!(""),
        ("truncate", [_, _]) => json!(text(0).chars().take(number(1).unwrap_or(0)).collect::<String>()),
        ("pad", [_, _, _]) => {
            let (before, after) = (number(1).unwrap_or(0), number(2).unwrap_or(0));
            ensure!(before <= WIDTH_MAX && after <= WIDTH_MAX, "nothing is padded by more than {WIDTH_MAX}");
            json!(format!("{:before$}{}{:after$}", "", text(0), ""))
        }
        ("len", [value]) => json!(match value {
            Value::String(text) => text.len(),
            Value::Array(list) => list.len(),
            Value::Object(map) => map.len(),
            Value::Null => 0,
            other => bail!("{other} has no length"),
        }),
        ("index", [value, keys @ ..]) => keys.iter().try_fold(value.clone(), |value, key| index(&value, key))?,
        ("slice", [value, ..]) => slice(value, number(1).unwrap_or(0), number(2))?,
        ("print", _) => json!(arguments.iter().map(printed).collect::<Vec<_>>().join(" ")),
        ("println", _) => json!(arguments.iter().map(printed).collect::<Vec<_>>().join(" ") + "\n"),
        ("printf", [Value::String(format), values @ ..]) => json!(formatted(format, values)?),
        ("not", [value]) => json!(!is_true(value)),
        ("and", [_, ..]) => {
            arguments.iter().find(|value| !is_true(value)).or_else(|| arguments.last()).cloned().unwrap_or_default()
        }
        ("or", [_, ..]) => {
            arguments.iter().find(|value| is_true(value)).or_else(|| arguments.last()).cloned().unwrap_or_default()
        }
        ("eq", [first, others @ ..]) if !others.is_empty() => json!(others.contains(first)),
        ("ne", [one, other]) => json!(one != other),
        ("lt" | "le" | "gt" | "ge", [one, other]) => json!(compare(name, one, other)?),
        _ if FUNCTIONS.contains(&name) => bail!("{name} does not take {} arguments of these kinds", arguments.len()),
        _ => bail!("{{{{{name}}}}} is not known: write a field such as .Name, or one of {}", FUNCTIONS.join(", ")),
    })
}

fn title(text: &str) -> String {
    let mut start = true;
    let letter = |letter: char| {
        let upper = if start { letter.to_uppercase().collect() } else { letter.to_string() };
        start = letter.is_whitespace();
        upper
    };
    text.chars().map(letter).collect()
}

fn index(value: &Value, key: &Value) -> anyhow::Result<Value> {
    match (value, key) {
        (Value::Array(list), Value::Number(_)) => {
            let found = key.as_u64().and_then(|at| list.get(usize::try_from(at).ok()?));
            found.cloned().with_context(|| format!("index {key} is beyond the list's {} entries", list.len()))
        }
        // What a map does not have is empty.
        (Value::Object(map), Value::String(key)) => Ok(map.get(key).cloned().unwrap_or_else(|| json!(""))),
        (Value::Null, _) => Ok(json!("")),
        _ => bail!("{value} cannot be indexed by {key}"),
    }
}

fn slice(value: &Value, from: usize, to: Option<usize>) -> anyhow::Result<Value> {
    let beyond = || format!("slice {from} to {to:?} is beyond {value}");
    match value {
        Value::String(text) => text.get(from..to.unwrap_or(text.len())).map(|part| json!(part)).with_context(beyond),
        Value::Array(list) => list.get(from..to.unwrap_or(list.len())).map(|part| json!(part)).with_context(beyond),
        other => bail!("{other} cannot be sliced"),
    }
}

fn compare(how: &str, one: &Value, other: &Value) -> anyhow::Result<bool> {
    let order = match (one, other) {
        (Value::Number(one), Value::Number(other)) => one.as_f64().partial_cmp(&other.as_f64()),
        (Value::String(one), Value::String(other)) => Some(one.cmp(other)),
        _ => None,
    };
    let order = order.with_context(|| format!("{one} and {other} cannot be compared"))?;
    Ok(match how {
        "lt" => order.is_lt(),
        "le" => order.is_le(),
        "gt" => order.is_gt(),
        _ => order.is_ge(),
    })
}

/// `%s`, `%v`, `%d`, `%q` and `%%`, with widths.
fn formatted(format: &str, values: &[Value]) -> anyhow::Result<String> {
    let (mut text, mut values, mut chars) = (String::new(), values.iter(), format.chars().peekable());
    while let Some(next) = chars.next() {
        if next != '%' {
            text.push(next);
            continue;
        }
        let mut width = String::new();
        while let Some(&part) = chars.peek().filter(|part| part.is_ascii_digit() || **part == '-') {
            width.push(part);
            chars.next();
        }
        let kind = chars.next().with_context(|| format!("{format:?} ends with %"))?;
        if kind == '%' {
            text.push('%');
            continue;
        }
        let value = values.next().with_context(|| format!("{format:?} asks for more values than there are"))?;
        let cell = match kind {
            's' | 'v' | 'd' => printed(value),
            'q' => json!(printed(value)).to_string(),
            other => bail!("%{other} is not known in {format:?}: use %s, %v, %d or %q"),
        };
        let digits = width.trim_start_matches('-');
        let len = if digits.is_empty() { Some(0) } else { digits.parse().ok().filter(|&len| len <= WIDTH_MAX) };
        let len = len.with_context(|| format!("%{width} in {format:?} is no width up to {WIDTH_MAX}"))?;
        if width.starts_with('-') { write!(text, "{cell:<len$}")? } else { write!(text, "{cell:>len$}")? }
    }
    Ok(text)
}
