//! A table of nftables as a value: what it should hold, and the script that brings the kernel there
//! from what it holds. A script is one transaction: packets see the table before it or after it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// One table of family `ip`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ruleset {
    pub(crate) table: &'static str,
    /// Sets and maps with their types, and the chains that never change, as `nft` reads them.
    pub(crate) frame: &'static str,
    pub(crate) sets: BTreeMap<&'static str, BTreeSet<String>>,
    pub(crate) maps: BTreeMap<&'static str, BTreeMap<String, String>>,
    /// Chains that come and go, each with its rules.
    pub(crate) chains: BTreeMap<String, Vec<String>>,
}

impl Ruleset {
    pub(crate) fn insert(&mut self, set: &'static str, element: String) {
        self.sets.entry(set).or_default().insert(element);
    }

    pub(crate) fn map(&mut self, map: &'static str, key: String, value: String) {
        self.maps.entry(map).or_default().insert(key, value);
    }

    /// The script that makes the table anew, whatever was there.
    pub(crate) fn script(&self) -> String {
        let table = self.table;
        let mut text = format!("table ip {table} {{}}\ndelete table ip {table}\ntable ip {table} {{\n{}", self.frame);
        for (name, rules) in &self.chains {
            let _ = writeln!(text, "  chain {name} {{\n    {}\n  }}", rules.join("\n    "));
        }
        text += "}\n";
        let nothing = Self::default();
        self.write_elements(&nothing, &mut text);
        text
    }

    /// The script that leads here from `before`; empty if nothing is to be done.
    ///
    /// Its length depends on what is different, not on how much there is.
    pub(crate) fn script_from(&self, before: &Self) -> String {
        let table = self.table;
        let mut text = String::new();
        for (name, rules) in &self.chains {
            match before.chains.get(name) {
                Some(held) if held == rules => continue,
                Some(_) => {
                    let _ = writeln!(text, "flush chain ip {table} {name}");
                }
                None => {
                    let _ = writeln!(text, "add chain ip {table} {name}");
                }
            }
            for rule in rules {
                let _ = writeln!(text, "add rule ip {table} {name} {rule}");
            }
        }
        self.write_elements(before, &mut text);
        // Nothing may point to a chain that goes.
        for name in before.chains.keys().filter(|name| !self.chains.contains_key(*name)) {
            let _ = writeln!(text, "flush chain ip {table} {name}\ndelete chain ip {table} {name}");
        }
        text
    }

    fn write_elements(&self, before: &Self, text: &mut String) {
        let table = self.table;
        let (no_set, no_map) = (BTreeSet::new(), BTreeMap::new());
        for name in self.sets.keys().chain(before.sets.keys()).collect::<BTreeSet<_>>() {
            let (held, wanted) = (before.sets.get(name).unwrap_or(&no_set), self.sets.get(name).unwrap_or(&no_set));
            let gone: Vec<_> = held.difference(wanted).map(String::as_str).collect();
            let new: Vec<_> = wanted.difference(held).map(String::as_str).collect();
            write_element(text, "delete", table, name, &gone);
            write_element(text, "add", table, name, &new);
        }
        for name in self.maps.keys().chain(before.maps.keys()).collect::<BTreeSet<_>>() {
            let (held, wanted) = (before.maps.get(name).unwrap_or(&no_map), self.maps.get(name).unwrap_or(&no_map));
            let gone = held.iter().filter(|(key, value)| wanted.get(*key) != Some(value));
            let gone: Vec<_> = gone.map(|(key, value)| format!("{key} : {value}")).collect();
            let new = wanted.iter().filter(|(key, value)| held.get(*key) != Some(value));
            let new: Vec<_> = new.map(|(key, value)| format!("{key} : {value}")).collect();
            write_element(text, "delete", table, name, &gone.iter().map(String::as_str).collect::<Vec<_>>());
            write_element(text, "add", table, name, &new.iter().map(String::as_str).collect::<Vec<_>>());
        }
    }
}

fn write_element(text: &mut String, verb: &str, table: &str, name: &str, elements: &[&str]) {
    if !elements.is_empty() {
        let _ = writeln!(text, "{verb} element ip {table} {name} {{ {} }}", elements.join(", "));
    }
}

/// Sends each new connection to the next of `targets` in turn (`address`, or `address . port`).
pub(crate) fn spread(targets: &[String]) -> String {
    let with_port = targets.first().is_some_and(|target| target.contains(" . "));
    let kind = if with_port { "dnat ip to" } else { "dnat to" };
    match targets {
        [only] => format!("{kind} {}", only.replace(" . ", ":")),
        many => {
            let elements: Vec<_> =
                many.iter().enumerate().map(|(number, target)| format!("{number} : {target}")).collect();
            format!("{kind} numgen inc mod {} map {{ {} }}", many.len(), elements.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(chains: &[(&str, &str)], elements: &[(&str, &str)]) -> Ruleset {
        let mut rules = Ruleset { table: "t", frame: "  F\n", ..Ruleset::default() };
        rules.chains.extend(chains.iter().map(|&(name, rule)| (name.to_owned(), vec![rule.to_owned()])));
        for &(key, value) in elements {
            rules.map("m", key.to_owned(), value.to_owned());
        }
        rules
    }

    #[test]
    fn a_change_says_only_what_is_different() {
        let before = rules(&[("a", "x"), ("b", "y"), ("c", "z")], &[("1", "jump a"), ("2", "jump b")]);
        let after = rules(&[("a", "x"), ("b", "w"), ("d", "v")], &[("1", "jump a"), ("2", "jump d")]);
        let want = "flush chain ip t b\nadd rule ip t b w\nadd chain ip t d\nadd rule ip t d v\n\
                    delete element ip t m { 2 : jump b }\nadd element ip t m { 2 : jump d }\n\
                    flush chain ip t c\ndelete chain ip t c\n";
        assert_eq!(after.script_from(&before), want);
        assert_eq!(after.script_from(&after), "");
        assert!(after.script().contains("delete table ip t") && after.script().contains("add element ip t m"));
    }

    #[test]
    fn connections_are_spread_in_turn() {
        let targets = |list: &[&str]| list.iter().map(|&t| t.to_owned()).collect::<Vec<_>>();
        assert_eq!(spread(&targets(&["10.0.0.2"])), "dnat to 10.0.0.2");
        assert_eq!(spread(&targets(&["10.0.0.2 . 80"])), "dnat ip to 10.0.0.2:80");
        assert_eq!(
            spread(&targets(&["10.0.0.2 . 80", "10.0.0.3 . 80"])),
            "dnat ip to numgen inc mod 2 map { 0 : 10.0.0.2 . 80, 1 : 10.0.0.3 . 80 }"
        );
    }
}
