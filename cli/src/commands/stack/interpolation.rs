//! `$NAME`, `${NAME:-default}` and so on in the values of a compose file.

use serde_json::Value;

use super::document::{Kind, Node};

/// Where variables come from.
pub(super) type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Fills in all variables; those that are not set are empty, and told of by `unset`.
pub(super) fn interpolate(
    node: &mut Node,
    path: &str,
    lookup: Lookup<'_>,
    unset: &mut Vec<String>,
) -> anyhow::Result<()> {
    let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    let filled = match &mut node.kind {
        Kind::Scalar(Value::String(text)) if text.contains('$') => expand(text, lookup, unset),
        Kind::Scalar(_) => return Ok(()),
        Kind::List(list) => {
            let mut list = list.iter_mut().enumerate();
            return list.try_for_each(|(index, node)| interpolate(node, &format!("{path}[{index}]"), lookup, unset));
        }
        Kind::Map(map) => {
            return map.iter_mut().try_for_each(|(key, node)| interpolate(node, &below(key), lookup, unset));
        }
    };
    let text = filled.map_err(|reason| node.wrong(path, reason))?;
    node.kind = Kind::Scalar(text.into());
    Ok(())
}

fn expand(text: &str, lookup: Lookup<'_>, unset: &mut Vec<String>) -> Result<String, String> {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        if let Some(after) = after.strip_prefix('$') {
            expanded.push('$');
            rest = after;
        } else if let Some(after) = after.strip_prefix('{') {
            let end = closing(after).ok_or_else(|| format!("\"${{{after}\" has no closing brace"))?;
            expanded.push_str(&substitute(&after[..end], lookup, unset)?);
            rest = &after[end + 1..];
        } else {
            let len = name_len(after);
            if len == 0 {
                return Err(format!("{text:?} has a $ that names no variable: write $$ for the sign itself"));
            }
            expanded.push_str(&known(&after[..len], lookup, unset));
            rest = &after[len..];
        }
    }
    expanded.push_str(rest);
    Ok(expanded)
}

/// How much of a text is a variable's name.
fn name_len(text: &str) -> usize {
    let starts = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
    if starts { end } else { 0 }
}

/// Where the brace closes that was opened before `text`.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 1;
    for (index, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(index);
        }
    }
    None
}

fn known(name: &str, lookup: Lookup<'_>, unset: &mut Vec<String>) -> String {
    lookup(name).unwrap_or_else(|| {
        if !unset.iter().any(|known| known == name) {
            unset.push(name.to_owned());
        }
        String::new()
    })
}

/// What `NAME`, `NAME:-default` and so on stand for.
fn substitute(inner: &str, lookup: Lookup<'_>, unset: &mut Vec<String>) -> Result<String, String> {
    let (name, rule) = inner.split_at(name_len(inner));
    if name.is_empty() {
        return Err(format!("\"${{{inner}}}\" names no variable"));
    }
    // With a colon, an empty value counts as none.
    let (rule, empty_counts) = rule.strip_prefix(':').map_or((rule, true), |rule| (rule, false));
    let value = lookup(name).filter(|value| empty_counts || !value.is_empty());
    match (rule.chars().next(), value) {
        (None, _) if empty_counts => Ok(known(name, lookup, unset)),
        (Some('-' | '?'), Some(value)) => Ok(value),
        (Some('-'), None) => expand(&rule[1..], lookup, unset),
        (Some('+'), Some(_)) => expand(&rule[1..], lookup, unset),
        (Some('+'), None) => Ok(String::new()),
        (Some('?'), None) => {
            let reason = expand(&rule[1..], lookup, unset)?;
            Err(format!("variable {name} is needed: {}", if reason.is_empty() { "set it" } else { &reason }))
        }
        _ => {
            Err(format!("\"${{{inner}}}\" cannot be read: write ${{{name}}}, or :-, :?, :+ and a text after the name"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, want: &str) {
        let lookup = |name: &str| match name {
            "TAG" => Some("1.27".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        assert_eq!(expand(text, &lookup, &mut Vec::new()).unwrap_or_else(|error| error), want, "{text}");
    }

    #[test]
    fn variables_are_filled_in() {
        check("nginx:$TAG", "nginx:1.27");
        check("nginx:${TAG}-x", "nginx:1.27-x");
        check("$$TAG a$$", "$TAG a$");
        check("[$NONE]", "[]");
        check("${NONE:-a}${NONE-b}${EMPTY:-c}${EMPTY-d}${TAG:-e}", "abc1.27");
        check("${NONE:+a}${TAG:+b}${EMPTY:+c}${EMPTY+d}", "bd");
        check("${NONE:-${TAG}}", "1.27");
    }

    #[test]
    fn what_is_missing_or_wrong_is_told() {
        check("${NONE:?give a tag}", "variable NONE is needed: give a tag");
        check("${EMPTY:?}", "variable EMPTY is needed: set it");
        check("${EMPTY?}", "");
        check("${TAG", "\"${TAG\" has no closing brace");
        check("5$", "\"5$\" has a $ that names no variable: write $$ for the sign itself");
        check("${1x}", "\"${1x}\" names no variable");
        check("${TAG!x}", "\"${TAG!x}\" cannot be read: write ${TAG}, or :-, :?, :+ and a text after the name");
    }
}
