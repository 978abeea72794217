//! What the client prints: tables, JSON, and the Go-style templates that people use.

use std::io::Write as _;

use serde_json::{Map, Value, json};

use crate::client::escape;

/// Options of every list.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct ListArgs {
    /// Only what matches: KEY=VALUE (repeatable)
    #[arg(short, long, value_name = "KEY=VALUE")]
    filter: Vec<String>,
    /// Print ids alone
    #[arg(short, long)]
    quiet: bool,
    /// table, json, or a template such as 'table {{.Name}}\t{{.ID}}'
    #[arg(long, value_name = "FORMAT")]
    format: Option<String>,
}

#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct FormatArg {
    /// json, or a template such as '{{.Name}} {{json .Labels}}'
    #[arg(short, long, value_name = "FORMAT")]
    pub(crate) format: Option<String>,
}

impl ListArgs {
    /// The `filters` parameter.
    pub(crate) fn query(&self) -> anyhow::Result<String> {
        Ok(format!("filters={}", escape(&self.filters()?.to_string())))
    }

    pub(crate) fn filters(&self) -> anyhow::Result<Value> {
        filters(&self.filter)
    }

    /// Prints rows; without a template, the columns are those that are given, under their titles.
    pub(crate) fn print(&self, columns: &[(&str, &str)], rows: &[Value]) -> anyhow::Result<()> {
        if self.quiet {
            return lines(rows.iter().map(|row| cell(&row["ID"])));
        }
        match self.format.as_deref() {
            None | Some("table") => print_table(columns, rows),
            Some("json") => lines(rows.iter().map(Value::to_string)),
            Some(template) => {
                let (template, with_heads) = match template.strip_prefix("table ") {
                    Some(template) => (template, true),
                    None => (template, false),
                };
                let texts: anyhow::Result<Vec<_>> = rows.iter().map(|row| render(template, &blank(row))).collect();
                if with_heads {
                    let heads = heads(template, columns);
                    let rows =
                        std::iter::once(heads).chain(texts?).map(|line| line.split('\t').map(str::to_owned).collect());
                    return aligned(&rows.collect::<Vec<_>>());
                }
                lines(texts?.into_iter())
            }
        }
    }
}

/// A row whose cells are empty where they say nothing.
fn blank(row: &Value) -> Value {
    let cells = row.as_object().into_iter().flatten();
    cells.map(|(key, cell)| (key.clone(), if cell.is_null() { json!("") } else { cell.clone() })).collect()
}

/// Fills a template; in it `\t` and `\n` stand for what they do in strings.
fn render(template: &str, value: &Value) -> anyhow::Result<String> {
    Ok(skep_api::template::render(&template.replace("\\t", "\t").replace("\\n", "\n"), value)?)
}

/// A template's first line in a table: the titles of its fields.
fn heads(template: &str, columns: &[(&str, &str)]) -> String {
    let mut text = template.replace("\\t", "\t");
    while let Some((before, (field, after))) =
        text.split_once("{{").and_then(|(before, rest)| Some((before, rest.split_once("}}")?)))
    {
        let key = field.rsplit('.').next().unwrap_or(field).trim();
        let title = columns.iter().find(|(column, _)| *column == key).map(|(_, title)| (*title).to_owned());
        text = format!("{before}{}{after}", title.unwrap_or_else(|| key.to_uppercase()));
    }
    text
}

/// Filters as the API takes them, from KEY=VALUE.
pub(crate) fn filters(given: &[String]) -> anyhow::Result<Value> {
    let mut filters = Map::new();
    for filter in given {
        let (key, value) = filter
            .split_once('=')
            .ok_or_else(|| anyhow::anyhow!("filter {filter:?} cannot be read: write KEY=VALUE"))?;
        let list = filters.entry(key).or_insert_with(|| json!([]));
        if let Value::Array(list) = list {
            list.push(json!(value));
        }
    }
    Ok(Value::Object(filters))
}

/// `ADDRESS:PORT`, as it is written for each kind of address.
pub(crate) fn socket(address: &str, port: &str) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

impl FormatArg {
    /// Prints one value: indented JSON unless a template is given.
    pub(crate) fn print(&self, value: &Value) -> anyhow::Result<()> {
        match self.format.as_deref() {
            None => line(&serde_json::to_string_pretty(value)?),
            Some("json") => line(&value.to_string()),
            Some(template) => line(&render(template, value)?),
        }
    }

    /// Prints objects: a JSON list, or a line of the template for each.
    pub(crate) fn print_all(&self, values: &[Value]) -> anyhow::Result<()> {
        match self.format.as_deref() {
            None => line(&serde_json::to_string_pretty(values)?),
            Some("json") => lines(values.iter().map(Value::to_string)),
            Some(template) => {
                let texts: anyhow::Result<Vec<_>> = values.iter().map(|value| render(template, value)).collect();
                lines(texts?.into_iter())
            }
        }
    }
}

impl FormatArg {
    /// As [`print_all`](Self::print_all), or for people to read.
    pub(crate) fn print_all_or_pretty(&self, values: &[Value], pretty: bool) -> anyhow::Result<()> {
        if !pretty {
            return self.print_all(values);
        }
        for (index, value) in values.iter().enumerate() {
            if index > 0 {
                line("")?;
            }
            lines(outline(value, 0).into_iter())?;
        }
        Ok(())
    }
}

/// An object as indented lines; what is empty is left out.
fn outline(value: &Value, depth: usize) -> Vec<String> {
    let indent = "  ".repeat(depth);
    let is_empty = |value: &Value| match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    };
    let member = |name: &str, value: &Value| match value {
        Value::Object(_) => {
            let below = outline(value, depth + 1);
            if below.is_empty() { below } else { [vec![format!("{indent}{name}:")], below].concat() }
        }
        Value::Array(list) if list.iter().any(Value::is_object) => {
            let entries = list.iter().flat_map(|entry| {
                let mut lines = outline(entry, depth + 2);
                if let Some(first) = lines.first_mut() {
                    first.replace_range(2 * depth + 2..2 * depth + 4, "- ");
                }
                lines
            });
            std::iter::once(format!("{indent}{name}:")).chain(entries).collect()
        }
        Value::Array(list) => vec![format!("{indent}{name}: {}", list.iter().map(cell).collect::<Vec<_>>().join(" "))],
        other => vec![format!("{indent}{name}: {}", cell(other))],
    };
    let members = value.as_object().into_iter().flatten().filter(|(_, value)| !is_empty(value));
    members.flat_map(|(name, value)| member(name, value)).collect()
}

/// Prints one line; a reader that went away ends the program quietly.
pub(crate) fn line(text: &str) -> anyhow::Result<()> {
    lines(std::iter::once(text.to_owned()))
}

fn lines(texts: impl Iterator<Item = String>) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    for text in texts {
        match writeln!(out, "{text}") {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
            other => other?,
        }
    }
    Ok(())
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn print_table(columns: &[(&str, &str)], rows: &[Value]) -> anyhow::Result<()> {
    let head: Vec<String> = columns.iter().map(|(_, title)| (*title).to_owned()).collect();
    let body = rows.iter().map(|row| columns.iter().map(|(key, _)| cell(&row[*key])).collect::<Vec<_>>());
    aligned(&std::iter::once(head).chain(body).collect::<Vec<_>>())
}

/// Prints lines of cells, one under the other.
pub(crate) fn aligned(table: &[Vec<String>]) -> anyhow::Result<()> {
    let cell_len = |row: &Vec<String>, column: usize| row.get(column).map_or(0, |cell| cell.chars().count());
    let width = |column: usize| table.iter().map(|row| cell_len(row, column)).max().unwrap_or(0);
    let widths: Vec<usize> = (0..table.iter().map(Vec::len).max().unwrap_or(0)).map(width).collect();
    lines(table.iter().map(|row| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("   ").trim_end().to_owned()
    }))
}

/// `3 minutes ago`, from an RFC 3339 time.
pub(crate) fn ago(timestamp: &Value) -> String {
    timestamp.as_str().and_then(parse_seconds).map_or_else(String::new, age)
}

/// The same, from seconds since 1970.
pub(crate) fn age(then: u64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let seconds = now.saturating_sub(then);
    match seconds {
        0..=59 => format!("{seconds} seconds ago"),
        60..=3599 => format!("{} minutes ago", seconds / 60),
        3600..=172_799 => format!("{} hours ago", seconds / 3600),
        172_800..=63_071_999 => format!("{} days ago", seconds / 86_400),
        _ => format!("{} years ago", seconds / 31_536_000),
    }
}

fn parse_seconds(text: &str) -> Option<u64> {
    u64::try_from(text.parse::<jiff::Timestamp>().ok()?.as_second()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outline_shows_what_is_there_and_no_more() {
        let value = json!({"ID": "x", "Spec": {"Env": ["A=1", "B=2"], "Labels": {}, "Ports": [{"Target": 80, "Mode": "host"}]}});
        let want = ["ID: x", "Spec:", "  Env: A=1 B=2", "  Ports:", "    - Target: 80", "      Mode: host"];
        assert_eq!(outline(&value, 0), want);
    }
}
