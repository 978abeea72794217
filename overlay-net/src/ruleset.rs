//! A table of nftables as a value: what it should hold, and the script that brings the kernel there
//! from what it holds. A script is one transaction: packets see the table before it or after it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// Which packets a table sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Family {
    #[default]
    V4,
    V6,
}

impl Family {
    /// As rules name it, and an address of it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        }
    }

    /// The type of an address.
    pub(crate) const fn address_type(self) -> &'static str {
        match self {
            Self::V4 => "ipv4_addr",
            Self::V6 => "ipv6_addr",
        }
    }
}

/// One table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ruleset {
    pub(crate) family: Family,
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

    /// The table's, with its family.
    pub(crate) fn name(&self) -> String {
        format!("{} {}", self.family.name(), self.table)
    }

    /// The script that makes the table where there is none.
    pub(crate) fn text(&self) -> String {
        let table = self.name();
        let mut text = format!("table {table} {{\n{}", self.frame);
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
        let table = self.name();
        let mut text = String::new();
        for (name, rules) in &self.chains {
            match before.chains.get(name) {
                Some(held) if held == rules => continue,
                Some(_) => {
                    let _ = writeln!(text, "flush chain {table} {name}");
                }
                None => {
                    let _ = writeln!(text, "add chain {table} {name}");
                }
            }
            for rule in rules {
                let _ = writeln!(text, "add rule {table} {name} {rule}");
            }
        }
        self.write_elements(before, &mut text);
        // Nothing may point to a chain that goes.
        for name in before.chains.keys().filter(|name| !self.chains.contains_key(*name)) {
            let _ = writeln!(text, "flush chain {table} {name}\ndelete chain {table} {name}");
        }
        text
    }

    fn write_elements(&self, before: &Self, text: &mut String) {
        let table = self.name();
        let (no_set, no_map) = (BTreeSet::new(), BTreeMap::new());
        for name in self.sets.keys().chain(before.sets.keys()).collect::<BTreeSet<_>>() {
            let (held, wanted) = (before.sets.get(name).unwrap_or(&no_set), self.sets.get(name).unwrap_or(&no_set));
            let gone: Vec<_> = held.difference(wanted).map(String::as_str).collect();
            let new: Vec<_> = wanted.difference(held).map(String::as_str).collect();
            write_element(text, "delete", &table, name, &gone);
            write_element(text, "add", &table, name, &new);
        }
        for name in self.maps.keys().chain(before.maps.keys()).collect::<BTreeSet<_>>() {
            let (held, wanted) = (before.maps.get(name).unwrap_or(&no_map), self.maps.get(name).unwrap_or(&no_map));
            let gone = held.iter().filter(|(key, value)| wanted.get(*key) != Some(value));
            let gone: Vec<_> = gone.map(|(key, value)| format!("{key} : {value}")).collect();
            let new = wanted.iter().filter(|(key, value)| held.get(*key) != Some(value));
            let new: Vec<_> = new.map(|(key, value)| format!("{key} : {value}")).collect();
            write_element(text, "delete", &table, name, &gone.iter().map(String::as_str).collect::<Vec<_>>());
            write_element(text, "add", &table, name, &new.iter().map(String::as_str).collect::<Vec<_>>());
        }
    }
}

fn write_element(text: &mut String, verb: &str, table: &str, name: &str, elements: &[&str]) {
    if !elements.is_empty() {
        let _ = writeln!(text, "{verb} element {table} {name} {{ {} }}", elements.join(", "));
    }
}

/// The tables of one namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tables {
    pub(crate) v4: Ruleset,
    /// None while no network has IPv6.
    pub(crate) v6: Option<Ruleset>,
}

impl Tables {
    /// The script that makes them anew, whatever was there.
    pub(crate) fn script(&self) -> String {
        self.cleared() + &self.v4.text() + &self.v6.as_ref().map(Ruleset::text).unwrap_or_default()
    }

    /// The script that has them be gone.
    pub(crate) fn cleared(&self) -> String {
        let families: &[Family] = if skep_host_net::has_ipv6() { &[Family::V4, Family::V6] } else { &[Family::V4] };
        families.iter().map(|family| cleared(&format!("{} {}", family.name(), self.v4.table))).collect()
    }

    /// The script that leads here from `before`; empty if nothing is to be done.
    pub(crate) fn script_from(&self, before: &Self) -> String {
        let v6 = match (&self.v6, &before.v6) {
            (Some(v6), Some(before)) => v6.script_from(before),
            (Some(v6), None) => v6.text(),
            (None, Some(before)) => cleared(&before.name()),
            (None, None) => String::new(),
        };
        self.v4.script_from(&before.v4) + &v6
    }

    /// Their names.
    pub(crate) fn names(&self) -> Vec<String> {
        std::iter::once(&self.v4).chain(&self.v6).map(Ruleset::name).collect()
    }
}

/// Has a table be gone, whether it was there or not.
fn cleared(table: &str) -> String {
    format!("table {table} {{}}\ndelete table {table}\n")
}

/// What connections to `key` (what `asked` reads off a packet) are sent to: to each of `targets` in turn. The chain of
/// that `name` does so, by a map that all such chains share.
pub(crate) fn spread(
    rules: &mut Ruleset,
    name: String,
    (map, asked): (&'static str, &str),
    key: &str,
    targets: &[String],
) {
    for (number, target) in targets.iter().enumerate() {
        rules.map(map, format!("{key} . {number}"), target.clone());
    }
    let family = rules.family.name();
    let rule = format!("dnat {family} to {asked} . numgen inc mod {} map @{map}", targets.len());
    rules.chains.insert(name, vec![rule]);
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
        let all = Tables { v4: after, v6: None }.script();
        assert!(all.contains("delete table ip t") && all.contains("add element ip t m"));
    }

    #[test]
    fn connections_are_spread_in_turn() {
        let mut rules = Ruleset::default();
        let targets = ["10.0.0.2 . 80", "10.0.0.3 . 80"].map(str::to_owned);
        spread(&mut rules, "web".into(), ("ports", "th dport"), "80", &targets);
        assert_eq!(rules.chains["web"], ["dnat ip to th dport . numgen inc mod 2 map @ports"]);
        let elements: Vec<_> = rules.maps["ports"].iter().map(|(key, value)| format!("{key}: {value}")).collect();
        assert_eq!(elements, ["80 . 0: 10.0.0.2 . 80", "80 . 1: 10.0.0.3 . 80"]);
    }
}
