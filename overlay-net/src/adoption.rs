//! Rules that an earlier daemon left are taken over: only what is different is changed. To make a table anew, be it in
//! one transaction with the end of the one before, costs packets: the kernel's sets of ranges answer only some
//! time after the rules that ask them are in force.
//!
//! What stands in sets and maps is compared. Chains that come and go are written again, which costs nothing. The frame is
//! as it was made if its digest is, which was noted once it was.

use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::net::IpAddr;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use skep_api::IpSubnet;
use skep_api::service::Protocol;

use crate::ruleset::{Elements, Family, Part, Ruleset, Said, Spread, SpreadKey, Tables};

/// The frames of tables, digested, as the kernel has them. A compiler that digests otherwise makes them look changed, no
/// more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Frames {
    v4: u64,
    v6: Option<u64>,
}

impl Frames {
    pub(crate) fn load(file: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(file).ok()?).ok()
    }

    pub(crate) fn save(self, file: &Path) -> io::Result<()> {
        fs::write(file, serde_json::to_vec(&self)?)
    }

    /// Whether these are of the same families.
    pub(crate) fn are_of(self, tables: &Tables) -> bool {
        self.v6.is_some() == tables.v6.is_some()
    }

    /// Of what the calling thread's namespace has of these tables; none if it has not all of them.
    pub(crate) fn listed(tables: &Tables) -> io::Result<Option<Self>> {
        let Some(v4) = Listed::of(&tables.v4)? else { return Ok(None) };
        let v4 = v4.frame_digest(&tables.v4);
        let Some(v6) = &tables.v6 else { return Ok(Some(Self { v4, v6: None })) };
        Ok(Listed::of(v6)?.map(|listed| Self { v4, v6: Some(listed.frame_digest(v6)) }))
    }
}

/// What is left in the calling thread's namespace of tables such as `wanted` whose frames were `noted`, for
/// [`Tables::script_from`]; none if they are not as they were left.
pub(crate) fn left_over(wanted: &Tables, noted: Frames) -> io::Result<Option<Tables>> {
    let take = |wanted: &Ruleset, noted: Option<u64>| -> io::Result<Option<Ruleset>> {
        let listed = Listed::of(wanted)?.filter(|listed| Some(listed.frame_digest(wanted)) == noted);
        Ok(listed.and_then(|listed| listed.read(wanted)))
    };
    let Some(v4) = take(&wanted.v4, Some(noted.v4))? else { return Ok(None) };
    let v6 = match &wanted.v6 {
        Some(wanted) if noted.v6.is_some() || Listed::of(wanted)?.is_some() => match take(wanted, noted.v6)? {
            Some(left) => Some(left),
            None => return Ok(None),
        },
        Some(_) => None,
        // There may be none, which is no matter.
        None => noted.v6.map(|_| Ruleset { family: Family::V6, ..v4.hollow() }),
    };
    Ok(Some(Tables { v4, v6 }))
}

/// A table as `nft` lists it.
struct Listed(Vec<Value>);

impl Listed {
    fn of(rules: &Ruleset) -> io::Result<Option<Self>> {
        let Some(text) = skep_host_net::list_table(&rules.name())? else { return Ok(None) };
        let listed: Value = serde_json::from_str(&text)?;
        Ok(listed["nftables"].as_array().cloned().map(Self))
    }

    /// All objects of a kind.
    fn all(&self, kind: &'static str) -> impl Iterator<Item = &Value> {
        self.0.iter().filter_map(move |object| object.get(kind))
    }

    /// Tells the chains of the frame, with their rules, from others.
    fn frame_digest(&self, rules: &Ruleset) -> u64 {
        let mut hasher = DefaultHasher::new();
        rules.frame.hash(&mut hasher);
        for chain in self.all("chain").filter(|chain| is_framed(rules, &chain["name"])) {
            for part in ["name", "type", "hook", "prio", "policy"] {
                chain[part].to_string().hash(&mut hasher);
            }
        }
        for rule in self.all("rule").filter(|rule| is_framed(rules, &rule["chain"])) {
            (rule["chain"].to_string(), rule["expr"].to_string()).hash(&mut hasher);
        }
        hasher.finish()
    }

    /// The table as a value; none if there is anything in it that is not known.
    fn read(&self, wanted: &Ruleset) -> Option<Ruleset> {
        /// What it does is not known: it is none that anybody wants.
        const UNKNOWN: Spread = Spread { key: SpreadKey::Port(Protocol::Tcp, 0), targets: Vec::new() };
        let mut rules = wanted.hollow();
        for set in self.all("set").chain(self.all("map")) {
            rules.elements.insert(framed_name(wanted, set["name"].as_str()?)?, elements(set)?);
        }
        for chain in self.all("chain").filter(|chain| !is_framed(wanted, &chain["name"])) {
            rules.chains.insert(chain["name"].as_str()?.to_owned(), UNKNOWN);
        }
        Some(rules)
    }
}

/// Whether a chain is one of those that never change.
fn is_framed(rules: &Ruleset, chain: &Value) -> bool {
    chain.as_str().is_some_and(|name| rules.frame.contains(&format!("chain {name} {{")))
}

/// The name of a set or a map, as the frame has it.
fn framed_name(rules: &Ruleset, name: &str) -> Option<&'static str> {
    let mut words = rules.frame.split_whitespace();
    while let Some(word) = words.next() {
        if matches!(word, "set" | "map") {
            let framed = words.next()?;
            if framed == name {
                return Some(framed);
            }
        }
    }
    None
}

fn elements(set: &Value) -> Option<Elements> {
    let kinds: Vec<&str> = match &set["type"] {
        Value::Array(kinds) => kinds.iter().map(Value::as_str).collect::<Option<_>>()?,
        kind => vec![kind.as_str()?],
    };
    let of_ranges = set["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == "interval"));
    let Some(listed) = set.get("elem") else { return Some(Elements::new()) };
    let element = |element: &Value| match set.get("map") {
        Some(kind) => Some((key(&element[0], &kinds, of_ranges)?, Some(said(&element[1], kind.as_str()?)?))),
        None => Some((key(element, &kinds, of_ranges)?, None)),
    };
    listed.as_array()?.iter().map(element).collect()
}

fn key(value: &Value, kinds: &[&str], of_ranges: bool) -> Option<Vec<Part>> {
    let parts = match value.get("concat") {
        Some(parts) => parts.as_array()?.as_slice(),
        None => std::slice::from_ref(value),
    };
    let parts: Vec<Part> =
        parts.iter().zip(kinds).map(|(value, kind)| part(value, kind, of_ranges)).collect::<Option<_>>()?;
    (parts.len() == kinds.len()).then_some(parts)
}

fn part(value: &Value, kind: &str, of_ranges: bool) -> Option<Part> {
    match kind {
        "ifname" => Some(Part::Link(value.as_str()?.to_owned())),
        "ipv4_addr" | "ipv6_addr" if of_ranges => subnet(value).map(Part::Subnet),
        "ipv4_addr" | "ipv6_addr" => Some(Part::Address(value.as_str()?.parse().ok()?)),
        "ether_addr" => mac(value.as_str()?).map(Part::Mac),
        "inet_proto" => Some(Part::Protocol(match value.as_str()? {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            _ => return None,
        })),
        "inet_service" => Some(Part::Port(u16::try_from(value.as_u64()?).ok()?)),
        _ => None,
    }
}

fn subnet(value: &Value) -> Option<IpSubnet> {
    let text = match value.get("prefix") {
        Some(prefix) => format!("{}/{}", prefix["addr"].as_str()?, prefix["len"].as_u64()?),
        None => {
            let address: IpAddr = value.as_str()?.parse().ok()?;
            format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 })
        }
    };
    text.parse().ok()
}

fn mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Vec<u8> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect::<Option<_>>()?;
    bytes.try_into().ok()
}

fn said(value: &Value, kind: &str) -> Option<Said> {
    match kind {
        "ipv4_addr" | "ipv6_addr" => Some(Said::Address(value.as_str()?.parse().ok()?)),
        "mark" => Some(Said::Mark(u32::try_from(value.as_u64()?).ok()?)),
        "verdict" => Some(Said::Goto(value["goto"]["target"].as_str()?.to_owned())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRAME: &str = "  set own { type ifname . ipv4_addr; }\n  set plain { type ipv4_addr; flags interval; }\n  \
        map peer_of { type ether_addr : mark; }\n  map virtual { type ipv4_addr : verdict; }\n  chain reach {\n  }\n";

    /// As nft 1.0.6 says it.
    const LISTED: &str = r#"{"nftables": [{"metainfo": {"version": "1.0.6"}}, {"table": {"name": "t", "handle": 3}},
        {"set": {"name": "own", "type": ["ifname", "ipv4_addr"], "elem": [{"concat": ["skv1", "10.0.1.3"]}]}},
        {"set": {"name": "plain", "type": "ipv4_addr", "flags": ["interval"],
          "elem": [{"prefix": {"addr": "10.0.2.0", "len": 24}}, "10.0.3.0"]}},
        {"map": {"name": "peer_of", "type": "ether_addr", "map": "mark", "elem": [["02:73:6b:70:00:01", 1]]}},
        {"map": {"name": "virtual", "type": "ipv4_addr", "map": "verdict",
          "elem": [["10.0.1.2", {"goto": {"target": "vip-10-0-1-2"}}]]}},
        {"chain": {"name": "reach", "handle": 4, "type": "filter", "hook": "forward", "prio": 0, "policy": "drop"}},
        {"chain": {"name": "vip-10-0-1-2", "handle": 40}}, {"chain": {"name": "vip-10-0-1-9", "handle": 41}},
        {"rule": {"chain": "reach", "handle": 29, "expr": [{"accept": null}]}},
        {"rule": {"chain": "vip-10-0-1-2", "handle": 43, "expr": [{"dnat": {"addr": "10.0.1.3"}}]}}]}"#;

    fn listed(text: &str) -> Listed {
        let listed: Value = serde_json::from_str(text).unwrap();
        Listed(listed["nftables"].as_array().unwrap().clone())
    }

    fn wanted() -> Ruleset {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let mut rules = Ruleset { table: "t", frame: FRAME, ..Ruleset::default() };
        rules.insert("own", [Part::Link("skv1".into()), address("10.0.1.3").into()]);
        rules.insert("plain", [Part::Subnet("10.0.2.0/24".parse().unwrap())]);
        rules.insert("plain", [Part::Subnet("10.0.3.0/32".parse().unwrap())]);
        rules.map("peer_of", [Part::Mac([2, 0x73, 0x6b, 0x70, 0, 1])], Said::Mark(1));
        rules.map("virtual", [address("10.0.1.2").into()], Said::Goto("vip-10-0-1-2".into()));
        let targets = vec![crate::ruleset::Target { address: address("10.0.1.3"), port: None }];
        let spread = Spread { key: SpreadKey::Address(address("10.0.1.2")), targets };
        rules.chains.insert("vip-10-0-1-2".into(), spread);
        rules
    }

    #[test]
    fn what_was_left_is_changed_where_it_differs_alone() {
        let mut wanted = wanted();
        let left = listed(LISTED).read(&wanted).unwrap();
        let chains = "flush chain ip t vip-10-0-1-2\nadd rule ip t vip-10-0-1-2 dnat to 10.0.1.3\n";
        let gone = "flush chain ip t vip-10-0-1-9\ndelete chain ip t vip-10-0-1-9\n";
        assert_eq!(wanted.difference(&left).script(), format!("{chains}{gone}"));
        wanted.map("peer_of", [Part::Mac([2, 0x73, 0x6b, 0x70, 0, 1])], Said::Mark(2));
        let element = "02:73:6b:70:00:01 : ";
        let turned =
            format!("delete element ip t peer_of {{ {element}1 }}\nadd element ip t peer_of {{ {element}2 }}\n");
        assert_eq!(wanted.difference(&left).script(), format!("{chains}{turned}{gone}"));
    }

    #[test]
    fn a_frame_that_somebody_changed_is_seen_and_what_is_unknown_is_not_taken() {
        let wanted = wanted();
        let digest = listed(LISTED).frame_digest(&wanted);
        for (part, changed, same) in [
            (r#"[{"accept": null}]"#, r#"[{"drop": null}]"#, false),
            (r#""policy": "drop""#, r#""policy": "accept""#, false),
            (r#""handle": 29"#, r#""handle": 30"#, true),
            (r#"{"addr": "10.0.1.3"}"#, r#"{"addr": "10.0.1.4"}"#, true),
        ] {
            assert_eq!(listed(&LISTED.replace(part, changed)).frame_digest(&wanted) == digest, same, "{changed}");
        }
        for (part, changed) in [("own", "others"), ("ifname", "string"), (r#""goto""#, r#""jump""#)] {
            assert_eq!(listed(&LISTED.replace(part, changed)).read(&wanted), None, "{changed}");
        }
    }
}
