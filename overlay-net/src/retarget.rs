//! Changes that others wait for, as tasks come and go: what chains send connections to, chains, and elements of sets. They
//! are said to the kernel itself, without the milliseconds that `nft` takes to begin; the rest (networks, and all of it
//! anew) are scripts.
//!
//! What is written here is what `nft` makes of [`Spread`]'s rule; names are those of
//! `linux/netfilter/nf_tables.h`.

use std::net::IpAddr;

use skep_api::service::Protocol;
use skep_host_net::nfnetlink::{Batch, attribute, nested, number, text};

use crate::ruleset::{Difference, Family, Part, Ruleset, Said, Spread, SpreadKey, Target};

const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_DELCHAIN: u16 = 5;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_DELRULE: u16 = 8;
const NFT_MSG_NEWSET: u16 = 9;
const NFT_MSG_NEWSETELEM: u16 = 12;
const NFT_MSG_DELSETELEM: u16 = 14;
/// Elements in one message.
const ELEMENTS_MAX: usize = 200;
/// A verdict of linux/netfilter/nf_tables.h: -4.
const NFT_GOTO: u32 = 4u32.wrapping_neg();
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;
/// Of each list.
const NFTA_LIST_ELEM: u16 = 1;
/// A map that goes with its rule, and does not change; the kernel finds a name for it.
const NFT_SET_ANONYMOUS_CONSTANT_MAP: u32 = 0x1 | 0x2 | 0x8;
const ANY_MAP: &str = "__map%d";
/// What `nft` calls the types of numbers, addresses and ports, and how many bits shift the first of two.
const TYPE_INTEGER: u32 = 4;
const TYPE_IPADDR: u32 = 7;
const TYPE_IP6ADDR: u32 = 8;
const TYPE_INET_SERVICE: u32 = 13;
const TYPE_BITS: u32 = 6;
/// Of linux/netfilter/nf_nat.h.
const NF_NAT_RANGE_PROTO_SPECIFIED: u32 = 0x2;
/// Registers of 16 bytes each, and the first one's second quarter.
const FIRST: u32 = 1;
const SECOND: u32 = 2;
const FIRST_QUARTER_TWO: u32 = 9;

/// What has the kernel hold what is different; only of what [is direct](Difference::is_direct).
pub(crate) fn batch(differences: &[Difference<'_>]) -> Batch {
    let mut batch = Batch::default();
    let mut ids = 1..;
    for difference in differences {
        let rules = difference.rules;
        let (family, table) = (family_number(rules.family), text(1, rules.table));
        for chain in difference.chains.iter().filter(|chain| chain.is_new) {
            batch.push(NFT_MSG_NEWCHAIN, NLM_F_CREATE, family, &[table.clone(), text(3, chain.name)]);
        }
        for (chain, id) in difference.chains.iter().zip(&mut ids) {
            write(&mut batch, id, rules, (chain.name, chain.spread));
        }
        for elements in &difference.elements {
            for (kind, flags, some) in
                [(NFT_MSG_DELSETELEM, 0, &elements.gone), (NFT_MSG_NEWSETELEM, NLM_F_CREATE, &elements.new)]
            {
                for some in some.chunks(ELEMENTS_MAX) {
                    let list: Vec<Vec<u8>> = some.iter().map(|&(key, said)| element(key, said.as_ref())).collect();
                    batch.push(kind, flags, family, &[table.clone(), text(2, elements.set), nested(3, &list)]);
                }
            }
        }
        // Nothing points to them any more.
        for name in &difference.gone_chains {
            batch.push(NFT_MSG_DELRULE, 0, family, &[table.clone(), text(2, name)]);
            batch.push(NFT_MSG_DELCHAIN, 0, family, &[table.clone(), text(3, name)]);
        }
    }
    batch
}

fn element(key: &[Part], said: Option<&Said>) -> Vec<u8> {
    let mut parts = vec![nested(1, &[attribute(1, &key_bytes(key))])];
    parts.extend(said.map(|said| match said {
        Said::Address(address) => nested(2, &[attribute(1, &octets(*address))]),
        Said::Mark(mark) => nested(2, &[attribute(1, &mark.to_ne_bytes())]),
        Said::Goto(chain) => nested(2, &[nested(2, &[number(1, NFT_GOTO), text(2, chain)])]),
    }));
    nested(NFTA_LIST_ELEM, &parts)
}

/// What a set is asked for, as registers hold it: each of several parts fills whole ones.
fn key_bytes(key: &[Part]) -> Vec<u8> {
    let bytes = |part: &Part| match part {
        Part::Link(name) => {
            let mut bytes = name.as_bytes().to_vec();
            bytes.resize(libc::IFNAMSIZ, 0);
            bytes
        }
        Part::Mac(mac) => mac.to_vec(),
        Part::Address(address) => octets(*address),
        Part::Protocol(protocol) => vec![protocol_number(*protocol)],
        Part::Port(port) => port.to_be_bytes().to_vec(),
        // Scripts alone say those.
        Part::Subnet(_) => Vec::new(),
    };
    let whole = |part: &Part| {
        let mut bytes = bytes(part);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    if let [only] = key { bytes(only) } else { key.iter().flat_map(whole).collect() }
}

fn family_number(family: Family) -> u8 {
    let number = match family {
        Family::V4 => libc::AF_INET,
        Family::V6 => libc::AF_INET6,
    };
    u8::try_from(number).unwrap_or(0)
}

/// Puts a chain's one rule in place of the one that is there; `id` tells its map from others.
pub(crate) fn write(batch: &mut Batch, id: u32, rules: &Ruleset, (name, spread): (&str, &Spread)) {
    let family = family_number(rules.family);
    let (table, chain) = (text(1, rules.table), text(2, name));
    batch.push(NFT_MSG_DELRULE, 0, family, &[table.clone(), chain.clone()]);
    if spread.targets.len() > 1 {
        let map = [table.clone(), text(2, ANY_MAP)];
        batch.push(NFT_MSG_NEWSET, NLM_F_CREATE, family, &[&map[..], &map_of(id, rules.family, spread)].concat());
        let element = |(slot, &target): (u32, &Target)| {
            let key = nested(1, &[attribute(1, &slot.to_ne_bytes())]);
            nested(NFTA_LIST_ELEM, &[key, nested(2, &[attribute(1, &data(target))])])
        };
        let elements: Vec<Vec<u8>> = (0..).zip(&spread.targets).map(element).collect();
        let elements = [&map[..], &[number(4, id), nested(3, &elements)]].concat();
        batch.push(NFT_MSG_NEWSETELEM, NLM_F_CREATE, family, &elements);
    }
    let rule = nested(4, &rule(id, rules.family, spread));
    batch.push(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, family, &[table, chain, rule]);
}

/// The rest of what makes a map.
fn map_of(id: u32, family: Family, spread: &Spread) -> Vec<Vec<u8>> {
    let (address_type, address_len) = match family {
        Family::V4 => (TYPE_IPADDR, 4),
        Family::V6 => (TYPE_IP6ADDR, 16),
    };
    let (data_type, data_len, big_endian) = match spread.key {
        SpreadKey::Address(_) => (address_type, address_len, 2u32),
        SpreadKey::Port(..) => (address_type << TYPE_BITS | TYPE_INET_SERVICE, address_len + 4, 0),
    };
    let count = u32::try_from(spread.targets.len()).unwrap_or(u32::MAX);
    // For those who list it: numbers are the host's way round, addresses the network's.
    let shown = [&[0, 4][..], &1u32.to_ne_bytes(), &[1, 4], &big_endian.to_ne_bytes(), &[6, 4], &[0; 4]].concat();
    vec![
        number(3, NFT_SET_ANONYMOUS_CONSTANT_MAP),
        number(4, TYPE_INTEGER),
        number(5, 4),
        number(6, data_type),
        number(7, data_len),
        number(10, id),
        nested(9, &[number(1, count)]),
        attribute(13, &shown),
    ]
}

/// Where connections are sent, as registers hold it.
fn data(target: Target) -> Vec<u8> {
    let mut bytes = octets(target.address);
    if let Some(port) = target.port {
        bytes.extend_from_slice(&port_bytes(port));
    }
    bytes
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

const fn port_bytes(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

fn protocol_number(protocol: Protocol) -> u8 {
    let number = match protocol {
        Protocol::Tcp => libc::IPPROTO_TCP,
        Protocol::Udp => libc::IPPROTO_UDP,
        Protocol::Sctp => libc::IPPROTO_SCTP,
    };
    u8::try_from(number).unwrap_or(0)
}

fn expression(name: &str, data: &[Vec<u8>]) -> Vec<u8> {
    nested(NFTA_LIST_ELEM, &[text(1, name), nested(2, data)])
}

/// The expressions of a rule: what is asked for, whose turn it is, where to.
fn rule(id: u32, family: Family, spread: &Spread) -> Vec<Vec<u8>> {
    let (l4proto, equal, incremental, dnat) = (16, 0, 0, 1);
    let value = |kind: u16, bytes: &[u8]| nested(kind, &[attribute(1, bytes)]);
    let mut rule = Vec::new();
    if let SpreadKey::Port(protocol, _) = spread.key {
        rule.push(expression("meta", &[number(2, l4proto), number(1, FIRST)]));
        let asked = value(3, &[protocol_number(protocol)]);
        rule.push(expression("cmp", &[number(1, FIRST), number(2, equal), asked]));
    }
    // Where the port lies that connections are sent to, and what else is to be said of it.
    let (port_at, port_said) = match spread.targets.as_slice() {
        [Target { address, port }] => {
            rule.push(expression("immediate", &[number(1, FIRST), value(2, &octets(*address))]));
            if let Some(port) = port {
                rule.push(expression("immediate", &[number(1, SECOND), value(2, &port.to_be_bytes())]));
            }
            (SECOND, Some(number(7, NF_NAT_RANGE_PROTO_SPECIFIED)))
        }
        many => {
            let count = u32::try_from(many.len()).unwrap_or(u32::MAX);
            let turn = [number(1, FIRST), number(2, count), number(3, incremental), number(4, 0)];
            rule.push(expression("numgen", &turn));
            rule.push(expression("lookup", &[number(2, FIRST), number(3, FIRST), text(1, ANY_MAP), number(4, id)]));
            (if family == Family::V4 { FIRST_QUARTER_TWO } else { SECOND }, None)
        }
    };
    let mut nat = vec![number(1, dnat), number(2, family_number(family).into()), number(3, FIRST)];
    if matches!(spread.key, SpreadKey::Port(..)) {
        nat.push(number(5, port_at));
        nat.extend(port_said);
    }
    rule.push(expression("nat", &nat));
    rule
}
