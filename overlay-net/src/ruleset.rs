//! A table of nftables as a value: what it should hold, and the script that brings the kernel there
//! from what it holds. A script is one transaction: packets see the table before it or after it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::net::IpAddr;

use skep_api::service::Protocol;

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

/// More targets of one chain do not fit a message to the kernel.
const RETARGETED_MAX: usize = 500;

/// One table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ruleset {
    pub(crate) family: Family,
    pub(crate) table: &'static str,
    /// Sets and maps with their types, and the chains that never change, as `nft` reads them.
    pub(crate) frame: &'static str,
    pub(crate) sets: BTreeMap<&'static str, BTreeSet<String>>,
    pub(crate) maps: BTreeMap<&'static str, BTreeMap<String, String>>,
    /// Chains that come and go, by their names.
    pub(crate) chains: BTreeMap<String, Spread>,
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
        for (name, spread) in &self.chains {
            let _ = writeln!(text, "  chain {name} {{\n    {}\n  }}", spread.rule(self.family));
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
        for (name, spread) in &self.chains {
            let (rule, held) = (spread.rule(self.family), before.chains.get(name).map(|held| held.rule(self.family)));
            match held {
                Some(held) if held == rule => continue,
                Some(_) => {
                    let _ = writeln!(text, "flush chain {table} {name}");
                }
                None => {
                    let _ = writeln!(text, "add chain {table} {name}");
                }
            }
            let _ = writeln!(text, "add rule {table} {name} {rule}");
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

    /// What leads here from `before`, if nothing is different but what chains send connections to: those chains.
    pub(crate) fn retargeted<'a>(&'a self, before: &'a Self) -> Option<Vec<(&'a str, &'a Spread)>> {
        let alike = self.sets == before.sets && self.maps == before.maps && self.frame == before.frame;
        if !alike || self.chains.len() != before.chains.len() {
            return None;
        }
        let mut retargeted = Vec::new();
        for ((name, now), (held_name, held)) in self.chains.iter().zip(&before.chains) {
            if name != held_name || now.key != held.key {
                return None;
            }
            if now.targets != held.targets {
                if !now.fits_a_message() {
                    return None;
                }
                retargeted.push((name.as_str(), now));
            }
        }
        Some(retargeted)
    }
}

/// A chain that sends connections to each of its targets in turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Spread {
    pub(crate) key: SpreadKey,
    pub(crate) targets: Vec<Target>,
}

/// What connections ask for that are spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SpreadKey {
    Address(IpAddr),
    Port(Protocol, u16),
}

/// Where a connection may be sent; without a port, to the one it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) address: IpAddr,
    pub(crate) port: Option<u16>,
}

impl fmt::Display for SpreadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Port(protocol, port) => write!(f, "{} . {port}", protocol.as_str()),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => write!(f, "{} . {port}", self.address),
            None => self.address.fmt(f),
        }
    }
}

impl Spread {
    pub(crate) const fn fits_a_message(&self) -> bool {
        self.targets.len() <= RETARGETED_MAX
    }

    fn rule(&self, family: Family) -> String {
        let family = family.name();
        let (matched, kind) = match self.key {
            SpreadKey::Address(_) => (String::new(), "dnat to".to_owned()),
            SpreadKey::Port(protocol, _) => {
                (format!("meta l4proto {} ", protocol.as_str()), format!("dnat {family} to"))
            }
        };
        match self.targets.as_slice() {
            [Target { address: IpAddr::V6(address), port: Some(port) }] => {
                format!("{matched}{kind} [{address}]:{port}")
            }
            [Target { address: IpAddr::V4(address), port: Some(port) }] => format!("{matched}{kind} {address}:{port}"),
            [only] => format!("{matched}{kind} {only}"),
            many => {
                let element = |(number, target)| format!("{number} : {target}");
                let elements: Vec<_> = many.iter().enumerate().map(element).collect();
                format!("{matched}{kind} numgen inc mod {} map {{ {} }}", many.len(), elements.join(", "))
            }
        }
    }
}

fn write_element(text: &mut String, verb: &str, table: &str, name: &str, elements: &[&str]) {
    if !elements.is_empty() {
        let _ = writeln!(text, "{verb} element {table} {name} {{ {} }}", elements.join(", "));
    }
}

/// Tables, each with the chains whose targets are others, by their names.
pub(crate) type Retargeted<'a> = Vec<(&'a Ruleset, Vec<(&'a str, &'a Spread)>)>;

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

    /// What leads here from `before` in each family, if nothing is different but what chains send connections to.
    pub(crate) fn retargeted<'a>(&'a self, before: &'a Self) -> Option<Retargeted<'a>> {
        let v6 = match (&self.v6, &before.v6) {
            (Some(v6), Some(before)) => Some((v6, v6.retargeted(before)?)),
            (None, None) => None,
            _ => return None,
        };
        Some(std::iter::once((&self.v4, self.v4.retargeted(&before.v4)?)).chain(v6).collect())
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
}

/// Has a table be gone, whether it was there or not.
fn cleared(table: &str) -> String {
    format!("table {table} {{}}\ndelete table {table}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(address: &str, targets: &[&str]) -> Spread {
        let target = |text: &&str| Target { address: text.parse().unwrap(), port: None };
        let key = SpreadKey::Address(address.parse().unwrap());
        Spread { key, targets: targets.iter().map(target).collect() }
    }

    fn rules(chains: &[(&str, Spread)], elements: &[(&str, &str)]) -> Ruleset {
        let mut rules = Ruleset { table: "t", frame: "  F\n", ..Ruleset::default() };
        rules.chains.extend(chains.iter().map(|(name, spread)| ((*name).to_owned(), spread.clone())));
        for &(key, value) in elements {
            rules.map("m", key.to_owned(), value.to_owned());
        }
        rules
    }

    #[test]
    fn a_change_says_only_what_is_different() {
        let [a, b, c] = ["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(|at| spread(at, &["10.1.0.1", "10.1.0.2"]));
        let fewer = spread("10.0.0.2", &["10.1.0.2"]);
        let d = spread("10.0.0.4", &["10.1.0.4"]);
        let before = rules(&[("a", a.clone()), ("b", b), ("c", c)], &[("1", "jump a"), ("2", "jump b")]);
        let after = rules(&[("a", a), ("b", fewer), ("d", d)], &[("1", "jump a"), ("2", "jump d")]);
        let want = "flush chain ip t b\nadd rule ip t b dnat to 10.1.0.2\nadd chain ip t d\n\
                    add rule ip t d dnat to 10.1.0.4\ndelete element ip t m { 2 : jump b }\n\
                    add element ip t m { 2 : jump d }\nflush chain ip t c\ndelete chain ip t c\n";
        assert_eq!(after.script_from(&before), want);
        assert_eq!(after.script_from(&after), "");
        assert_eq!(after.retargeted(&before), None);
        let all = Tables { v4: after, v6: None }.script();
        assert!(all.contains("delete table ip t") && all.contains("add element ip t m"));
    }

    #[test]
    fn it_is_seen_where_targets_alone_are_others() {
        let [a, b] = ["10.0.0.1", "10.0.0.2"].map(|at| spread(at, &["10.1.0.1", "10.1.0.2"]));
        let fewer = spread("10.0.0.2", &["10.1.0.2"]);
        let before = rules(&[("a", a.clone()), ("b", b)], &[("1", "jump a")]);
        let after = rules(&[("a", a.clone()), ("b", fewer.clone())], &[("1", "jump a")]);
        assert_eq!(after.retargeted(&before), Some(vec![("b", &fewer)]));
        assert_eq!(rules(&[("a", a), ("b", fewer)], &[]).retargeted(&before), None);
    }

    #[track_caller]
    fn check_rule(family: Family, port: Option<u16>, addresses: &[&str], want: &str) {
        let target = |text: &&str| Target { address: text.parse().unwrap(), port };
        let key = match port {
            Some(_) => SpreadKey::Port(Protocol::Udp, 53),
            None => SpreadKey::Address(addresses[0].parse().unwrap()),
        };
        assert_eq!(Spread { key, targets: addresses.iter().map(target).collect() }.rule(family), want);
    }

    #[test]
    fn connections_are_spread_in_turn() {
        check_rule(Family::V4, None, &["10.0.0.2"], "dnat to 10.0.0.2");
        check_rule(Family::V4, Some(80), &["10.0.0.2"], "meta l4proto udp dnat ip to 10.0.0.2:80");
        let two = "meta l4proto udp dnat ip to numgen inc mod 2 map { 0 : 10.0.0.2 . 80, 1 : 10.0.0.3 . 80 }";
        check_rule(Family::V4, Some(80), &["10.0.0.2", "10.0.0.3"], two);
        check_rule(Family::V6, Some(80), &["fd00::2"], "meta l4proto udp dnat ip6 to [fd00::2]:80");
        check_rule(
            Family::V6,
            None,
            &["fd00::2", "fd00::3"],
            "dnat to numgen inc mod 2 map { 0 : fd00::2, 1 : fd00::3 }",
        );
    }
}
