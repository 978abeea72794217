//! Several files as one: the later counts where both say something.

use std::collections::BTreeMap;

use serde_json::Value;

use super::document::{Kind, Node};

/// Keys of services whose lists of `KEY=VALUE` are maps.
const MAPS: [&str; 7] = ["environment", "labels", "sysctls", "networks", "options", "driver_opts", "depends_on"];
/// Keys whose lists are one thing as a whole.
const WHOLE: [&str; 3] = ["command", "entrypoint", "test"];

/// What `base` and `over` say together, both at `key`.
pub(super) fn merge(key: &str, base: Node, over: Node) -> Node {
    if over.is_null() {
        return base;
    }
    let (base, over) = if MAPS.contains(&key) { (as_map(base), as_map(over)) } else { (base, over) };
    match (base.kind, &over.kind) {
        (Kind::Map(was), Kind::Map(map)) if key == "logging" && is_other_driver(&was, map) => over,
        (Kind::Map(mut was), Kind::Map(map)) => {
            for (key, node) in map.clone() {
                let merged = match was.remove(&key) {
                    Some(before) => merge(&key, before, node),
                    None => node,
                };
                was.insert(key, merged);
            }
            over.with(Kind::Map(was))
        }
        (Kind::List(was), Kind::List(list)) if !WHOLE.contains(&key) => {
            let names: Vec<String> = list.iter().map(|node| name_in_list(key, node)).collect();
            let kept = was.into_iter().filter(|node| !names.contains(&name_in_list(key, node)));
            let all = kept.chain(list.clone()).collect();
            over.with(Kind::List(all))
        }
        _ => over,
    }
}

fn is_other_driver(base: &BTreeMap<String, Node>, over: &BTreeMap<String, Node>) -> bool {
    let driver = |map: &BTreeMap<String, Node>| map.get("driver").map(as_text);
    driver(over).is_some() && driver(base).is_some() && driver(over) != driver(base)
}

/// `KEY=VALUE` in a list as a map's entry.
fn as_map(node: Node) -> Node {
    let Kind::List(list) = &node.kind else { return node };
    let entries = list.iter().map(|node| {
        let text = as_text(node);
        match text.split_once('=') {
            Some((key, value)) => (key.to_owned(), node.with(Kind::Scalar(value.into()))),
            None => (text, node.with(Kind::Scalar(Value::Null))),
        }
    });
    let map = entries.collect();
    node.with(Kind::Map(map))
}

/// What tells the entries of a list apart: two of one name are one.
fn name_in_list(key: &str, node: &Node) -> String {
    let member = |map: &BTreeMap<String, Node>, key: &str| map.get(key).map(as_text).unwrap_or_default();
    match (key, &node.kind) {
        ("volumes", Kind::Map(map)) => member(map, "target"),
        ("volumes", _) => {
            let text = as_text(node);
            let mut parts = text.split(':');
            let first = parts.next().unwrap_or_default();
            parts.next().unwrap_or(first).to_owned()
        }
        ("secrets" | "configs", Kind::Map(map)) => member(map, "source"),
        ("ports", Kind::Map(map)) => format!("{}:{}", member(map, "published"), member(map, "target")),
        _ => as_text(node),
    }
}

fn as_text(node: &Node) -> String {
    match &node.kind {
        Kind::Scalar(Value::String(text)) => text.clone(),
        _ => serde_json::to_string(node).unwrap_or_default(),
    }
}
