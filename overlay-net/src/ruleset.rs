//! A table of nftables as a value: what it should hold, and the script that brings the kernel there
//! from what it holds. A script is one transaction: packets see the table before it or after it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::net::IpAddr;

use skep_api::IpSubnet;
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

/// A part of what a set or map is asked for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    Link(String),
    Mac([u8; 6]),
    Address(IpAddr),
    Subnet(IpSubnet),
    Protocol(Protocol),
    Port(u16),
}

/// What a map answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    Address(IpAddr),
    Mark(u32),
    /// Go on in this chain.
    Goto(String),
}

/// What sets are asked for, and maps with their answers.
pub(crate) type Elements = BTreeMap<Vec<Part>, Option<Said>>;

impl From<IpAddr> for Part {
    fn from(address: IpAddr) -> Self {
        Self::Address(address)
    }
}

impl From<IpSubnet> for Part {
    fn from(subnet: IpSubnet) -> Self {
        Self::Subnet(subnet)
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(name) => write!(f, "\"{name}\""),
            Self::Mac([a, b, c, d, e, last]) => write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{last:02x}"),
            Self::Address(address) => address.fmt(f),
            Self::Subnet(subnet) => subnet.fmt(f),
            Self::Protocol(protocol) => f.write_str(protocol.as_str()),
            Self::Port(port) => port.fmt(f),
        }
    }
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Mark(mark) => mark.fmt(f),
            Self::Goto(chain) => write!(f, "goto {chain}"),
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
    /// Of sets and maps, by their names.
    pub(crate) elements: BTreeMap<&'static str, Elements>,
    /// Chains that come and go, by their names.
    pub(crate) chains: BTreeMap<String, Spread>,
}

impl Ruleset {
    pub(crate) fn insert<const N: usize>(&mut self, set: &'static str, key: [Part; N]) {
        self.elements.entry(set).or_default().insert(key.into(), None);
    }

    pub(crate) fn map<const N: usize>(&mut self, map: &'static str, key: [Part; N], said: Said) {
        self.elements.entry(map).or_default().insert(key.into(), Some(said));
    }

    /// The table's, with its family.
    pub(crate) fn name(&self) -> String {
        format!("{} {}", self.family.name(), self.table)
    }

    /// The same with nothing in it.
    pub(crate) fn hollow(&self) -> Self {
        Self { family: self.family, table: self.table, frame: self.frame, ..Self::default() }
    }

    /// The script that makes the table where there is none.
    pub(crate) fn text(&self) -> String {
        let nothing = Self::default();
        format!("table {} {{\n{}}}\n", self.name(), self.frame) + &self.difference(&nothing).script()
    }

    /// What leads here from `before`: as much as is different, not as there is.
    pub(crate) fn difference<'a>(&'a self, before: &'a Self) -> Difference<'a> {
        let is_alike = |name: &String, spread: &Spread| before.chains.get(name) == Some(spread);
        let chains = self.chains.iter().filter(|(name, spread)| !is_alike(name, spread)).map(|(name, spread)| {
            let is_new = !before.chains.contains_key(name);
            ChangedChain { name, spread, is_new }
        });
        let gone_chains = before.chains.keys().filter(|name| !self.chains.contains_key(*name));
        static NOTHING: Elements = Elements::new();
        let names: BTreeSet<_> = self.elements.keys().chain(before.elements.keys()).copied().collect();
        let elements = names.into_iter().map(|set| {
            let [held, wanted] = [before, self].map(|rules| rules.elements.get(set).unwrap_or(&NOTHING));
            let without = |some: &'a Elements, others: &'a Elements| {
                some.iter().filter(|(key, said)| others.get(*key) != Some(said)).collect()
            };
            ChangedElements { set, gone: without(held, wanted), new: without(wanted, held) }
        });
        Difference {
            rules: self,
            chains: chains.collect(),
            gone_chains: gone_chains.map(String::as_str).collect(),
            elements: elements.filter(|elements| !elements.gone.is_empty() || !elements.new.is_empty()).collect(),
        }
    }
}

/// What leads from one state of a table to another.
#[derive(Debug)]
pub(crate) struct Difference<'a> {
    /// Where it leads to.
    pub(crate) rules: &'a Ruleset,
    pub(crate) chains: Vec<ChangedChain<'a>>,
    pub(crate) gone_chains: Vec<&'a str>,
    pub(crate) elements: Vec<ChangedElements<'a>>,
}

#[derive(Debug)]
pub(crate) struct ChangedChain<'a> {
    pub(crate) name: &'a str,
    pub(crate) spread: &'a Spread,
    pub(crate) is_new: bool,
}

#[derive(Debug)]
pub(crate) struct ChangedElements<'a> {
    pub(crate) set: &'static str,
    pub(crate) gone: Vec<(&'a Vec<Part>, &'a Option<Said>)>,
    pub(crate) new: Vec<(&'a Vec<Part>, &'a Option<Said>)>,
}

impl Difference<'_> {
    /// The script of it; empty if nothing is to be done.
    pub(crate) fn script(&self) -> String {
        let (table, mut text) = (self.rules.name(), String::new());
        for ChangedChain { name, spread, is_new } in &self.chains {
            let verb = if *is_new { "add" } else { "flush" };
            let rule = spread.rule(self.rules.family);
            let _ = writeln!(text, "{verb} chain {table} {name}\nadd rule {table} {name} {rule}");
        }
        for ChangedElements { set, gone, new } in &self.elements {
            write_element(&mut text, "delete", &table, set, gone);
            write_element(&mut text, "add", &table, set, new);
        }
        // Nothing may point to a chain that goes.
        for name in &self.gone_chains {
            let _ = writeln!(text, "flush chain {table} {name}\ndelete chain {table} {name}");
        }
        text
    }

    /// Whether it can be said to the kernel without a script.
    pub(crate) fn is_direct(&self) -> bool {
        let is_plain = |(key, _): &(&Vec<Part>, _)| !key.iter().any(|part| matches!(part, Part::Subnet(_)));
        self.chains.iter().all(|chain| chain.spread.fits_a_message())
            && self.elements.iter().all(|elements| elements.gone.iter().chain(&elements.new).all(is_plain))
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

fn write_element(text: &mut String, verb: &str, table: &str, set: &str, elements: &[(&Vec<Part>, &Option<Said>)]) {
    if elements.is_empty() {
        return;
    }
    let element = |(key, said): &(&Vec<Part>, &Option<Said>)| {
        let key: Vec<String> = key.iter().map(Part::to_string).collect();
        let said = said.as_ref().map(|said| format!(" : {said}")).unwrap_or_default();
        key.join(" . ") + &said
    };
    let elements: Vec<String> = elements.iter().map(element).collect();
    let _ = writeln!(text, "{verb} element {table} {set} {{ {} }}", elements.join(", "));
}

/// The tables of one namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tables {
    pub(crate) v4: Ruleset,
    /// None while no network has IPv6.
    pub(crate) v6: Option<Ruleset>,
}

impl Tables {
    /// The same with nothing in them.
    pub(crate) fn hollow(&self) -> Self {
        Self { v4: self.v4.hollow(), v6: self.v6.as_ref().map(Ruleset::hollow) }
    }

    /// The script that makes them anew, whatever was there.
    pub(crate) fn script(&self) -> String {
        self.cleared() + &self.v4.text() + &self.v6.as_ref().map(Ruleset::text).unwrap_or_default()
    }

    /// The script that has them be gone.
    pub(crate) fn cleared(&self) -> String {
        let families: &[Family] = if skep_host_net::has_ipv6() { &[Family::V4, Family::V6] } else { &[Family::V4] };
        families.iter().map(|family| cleared(&format!("{} {}", family.name(), self.v4.table))).collect()
    }

    /// What leads here from `before` in each family, if it can be said to the kernel without a script.
    pub(crate) fn direct_difference<'a>(&'a self, before: &'a Self) -> Option<Vec<Difference<'a>>> {
        let v6 = match (&self.v6, &before.v6) {
            (Some(v6), Some(before)) => Some(v6.difference(before)),
            (None, None) => None,
            _ => return None,
        };
        let differences = std::iter::once(self.v4.difference(&before.v4)).chain(v6);
        differences.map(|difference| difference.is_direct().then_some(difference)).collect()
    }

    /// The script that leads here from `before`; empty if nothing is to be done.
    pub(crate) fn script_from(&self, before: &Self) -> String {
        let v6 = match (&self.v6, &before.v6) {
            (Some(v6), Some(before)) => v6.difference(before).script(),
            (Some(v6), None) => v6.text(),
            (None, Some(before)) => cleared(&before.name()),
            (None, None) => String::new(),
        };
        self.v4.difference(&before.v4).script() + &v6
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
            rules.map("m", [Part::Link(key.to_owned())], Said::Goto(value.to_owned()));
        }
        rules
    }

    #[test]
    fn a_change_says_only_what_is_different() {
        let [a, b, c] = ["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(|at| spread(at, &["10.1.0.1", "10.1.0.2"]));
        let fewer = spread("10.0.0.2", &["10.1.0.2"]);
        let d = spread("10.0.0.4", &["10.1.0.4"]);
        let before = rules(&[("a", a.clone()), ("b", b), ("c", c)], &[("1", "a"), ("2", "b")]);
        let after = rules(&[("a", a), ("b", fewer), ("d", d)], &[("1", "a"), ("2", "d")]);
        let want = "flush chain ip t b\nadd rule ip t b dnat to 10.1.0.2\nadd chain ip t d\n\
                    add rule ip t d dnat to 10.1.0.4\ndelete element ip t m { \"2\" : goto b }\n\
                    add element ip t m { \"2\" : goto d }\nflush chain ip t c\ndelete chain ip t c\n";
        assert_eq!(after.difference(&before).script(), want);
        assert_eq!(after.difference(&after).script(), "");
        assert!(after.difference(&before).is_direct());
        let mut wider = after.clone();
        wider.insert("s", [IpSubnet::V4("10.0.0.0/24".parse().unwrap()).into()]);
        assert!(!wider.difference(&after).is_direct() && !after.difference(&wider).is_direct());
        assert_eq!(wider.difference(&after).script(), "add element ip t s { 10.0.0.0/24 }\n");
        let all = Tables { v4: after, v6: None }.script();
        assert!(all.contains("delete table ip t") && all.contains("add element ip t m"));
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
