//! Names: which addresses a service, a container or an alias has, as its neighbours in a network ask.
//!
//! [`answer`] decides: a question's bytes and the asker's networks in, an answer's bytes out, or the
//! word that somebody else should be asked. [`NameServers`] asks it for every container that is served.
//!
//! It knows neither swarm nor engine: whoever keeps networks says what names they have.

mod server;

pub use server::{ADDRESS, NameServers, Served};

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use bincode::{Decode, Encode};
use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

/// Tasks come and go: nobody should keep an answer for long.
const TTL_SECS: u32 = 5;
/// What an answer over UDP may have unless the asker takes more (RFC 1035 §4.2.1).
const UDP_LEN: u16 = 512;
const REVERSE_SUFFIX: &str = ".in-addr.arpa.";
const REVERSE_SUFFIX_V6: &str = ".ip6.arpa.";

/// The names of one network, in lower case and without a dot at the end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Zone {
    /// What the network is called, which may stand behind a name: `web.front`; empty: it may not.
    pub network: String,
    pub names: BTreeMap<String, Vec<Ipv4Addr>>,
    pub reverse: BTreeMap<Ipv4Addr, String>,
    pub names_v6: BTreeMap<String, Vec<Ipv6Addr>>,
    pub reverse_v6: BTreeMap<Ipv6Addr, String>,
}

/// What becomes of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Reply(Vec<u8>),
    /// The name is none of ours.
    AskOthers,
    /// It cannot be read, or is no question.
    Ignore,
}

/// How a question came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

/// Answers a question of somebody in the networks of `zones`. `turn` says which address comes first,
/// so that askers who take the first one are spread.
#[must_use]
pub fn answer(question: &[u8], zones: &[&Zone], transport: Transport, turn: usize) -> Answer {
    let Ok(message) = Message::from_vec(question) else { return Answer::Ignore };
    let asks = message.metadata.message_type == MessageType::Query && message.metadata.op_code == OpCode::Query;
    let [query] = message.queries.as_slice() else { return Answer::Ignore };
    if !asks || query.query_class() != DNSClass::IN {
        return Answer::AskOthers;
    }
    let name = query.name().to_ascii().to_lowercase();
    match look_up(&name, query, zones, turn) {
        Found::Records(records) => reply(&message, query, ResponseCode::NoError, records, transport),
        Found::NoSuchName => reply(&message, query, ResponseCode::NXDomain, Vec::new(), transport),
        Found::NotOurs => Answer::AskOthers,
    }
}

/// The reply when nobody else may be asked, or none of them answers.
pub(crate) fn refuse(question: &[u8], code: ResponseCode, transport: Transport) -> Answer {
    let Ok(message) = Message::from_vec(question) else { return Answer::Ignore };
    let Some(query) = message.queries.first() else { return Answer::Ignore };
    reply(&message, query, code, Vec::new(), transport)
}

enum Found {
    /// The name is there; perhaps not with what was asked for.
    Records(Vec<RData>),
    NoSuchName,
    NotOurs,
}

fn look_up(name: &str, query: &Query, zones: &[&Zone], turn: usize) -> Found {
    let reversed = name.strip_suffix(REVERSE_SUFFIX).map(|reversed| {
        let address = reversed_address(reversed);
        address.and_then(|address| zones.iter().find_map(|zone| zone.reverse.get(&address)))
    });
    let reversed = reversed.or_else(|| {
        let address = reversed_address_v6(name.strip_suffix(REVERSE_SUFFIX_V6)?);
        Some(address.and_then(|address| zones.iter().find_map(|zone| zone.reverse_v6.get(&address))))
    });
    if let Some(found) = reversed {
        return match found.and_then(|name| Name::from_ascii(format!("{name}.")).ok()) {
            Some(name) if query.query_type() == RecordType::PTR => Found::Records(vec![RData::PTR(PTR(name))]),
            Some(_) => Found::Records(Vec::new()),
            None => Found::NotOurs,
        };
    }
    let bare = name.trim_end_matches('.');
    let has = |zone: &Zone, name: &str| zone.names.contains_key(name) || zone.names_v6.contains_key(name);
    let whole = zones.iter().find(|zone| has(zone, bare)).map(|zone| (zone, bare));
    let with_name = whole.or_else(|| {
        let within = |zone: &&Zone| bare.strip_suffix(zone.network.as_str())?.strip_suffix('.');
        let named = zones.iter().filter(|zone| !zone.network.is_empty());
        named.filter_map(|zone| Some((zone, within(zone)?))).find(|(zone, name)| has(zone, name))
    });
    if let Some((zone, name)) = with_name {
        let asked = |kind| [kind, RecordType::ANY].contains(&query.query_type());
        let v4 = in_turn(zone.names.get(name).filter(|_| asked(RecordType::A)), turn);
        let v6 = in_turn(zone.names_v6.get(name).filter(|_| asked(RecordType::AAAA)), turn);
        let v6 = v6.into_iter().map(|address| RData::AAAA(AAAA(address)));
        return Found::Records(v4.into_iter().map(|address| RData::A(A(address))).chain(v6).collect());
    }
    // A name without a dot, or of tasks, could only be one of ours: no need to bother others.
    let ours = !bare.contains('.') || bare.strip_prefix("tasks.").is_some_and(|service| !service.contains('.'));
    if ours && !bare.is_empty() { Found::NoSuchName } else { Found::NotOurs }
}

fn in_turn<A: Clone>(addresses: Option<&Vec<A>>, turn: usize) -> Vec<A> {
    let mut addresses = addresses.cloned().unwrap_or_default();
    if !addresses.is_empty() {
        let first = turn % addresses.len();
        addresses.rotate_left(first);
    }
    addresses
}

/// Every digit on its own, the last first.
fn reversed_address_v6(text: &str) -> Option<Ipv6Addr> {
    let digits: Vec<u32> = text.split('.').map(|digit| u32::from_str_radix(digit, 16).ok()).collect::<Option<_>>()?;
    let fits = digits.len() == 32 && digits.iter().all(|&digit| digit < 16);
    fits.then(|| Ipv6Addr::from(digits.iter().rev().fold(0, |address: u128, &digit| address << 4 | u128::from(digit))))
}

/// `4.3.2.1` stands for 1.2.3.4.
fn reversed_address(text: &str) -> Option<Ipv4Addr> {
    let [a, b, c, d] = text.parse::<Ipv4Addr>().ok()?.octets();
    Some(Ipv4Addr::new(d, c, b, a))
}

fn reply(question: &Message, query: &Query, code: ResponseCode, data: Vec<RData>, transport: Transport) -> Answer {
    let mut message = Message::response(question.metadata.id, OpCode::Query);
    message.metadata.recursion_desired = question.metadata.recursion_desired;
    message.metadata.recursion_available = true;
    message.metadata.response_code = code;
    message.add_query(query.clone());
    message.add_answers(data.into_iter().map(|data| Record::from_rdata(query.name().clone(), TTL_SECS, data)));
    let Ok(mut bytes) = message.to_vec() else { return Answer::Ignore };
    let limit = usize::from(question.max_payload().max(UDP_LEN));
    if transport == Transport::Udp && bytes.len() > limit {
        // The asker comes back over TCP.
        message.answers.clear();
        message.metadata.truncation = true;
        match message.to_vec() {
            Ok(short) => bytes = short,
            Err(_) => return Answer::Ignore,
        }
    }
    Answer::Reply(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn zone() -> Zone {
        let address = |last: u8| Ipv4Addr::new(10, 0, 1, last);
        Zone {
            network: "front.net".into(),
            names: [
                ("web".to_owned(), vec![address(2)]),
                ("tasks.web".to_owned(), vec![address(3), address(4)]),
                ("many".to_owned(), (1..200).map(address).collect()),
            ]
            .into(),
            reverse: [(address(3), "web.1.abc".to_owned())].into(),
            names_v6: [("web".to_owned(), vec!["fd00::2".parse().unwrap()])].into(),
            reverse_v6: [("fd00::2".parse().unwrap(), "web.1.abc".to_owned())].into(),
        }
    }

    fn ask(name: &str, kind: RecordType, transport: Transport) -> Answer {
        let mut message = Message::query();
        message.metadata.id = 7;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        answer(&message.to_vec().unwrap(), &[&Zone::default(), &zone()], transport, 1)
    }

    #[track_caller]
    fn check(name: &str, kind: RecordType, want: &str) {
        let got = match ask(name, kind, Transport::Udp) {
            Answer::Reply(bytes) => {
                let message = Message::from_vec(&bytes).unwrap();
                assert_eq!(message.metadata.id, 7);
                let data: Vec<_> = message.answers.iter().map(|record| record.data.to_string()).collect();
                format!("{:?} {}", message.metadata.response_code, data.join(" "))
            }
            Answer::AskOthers => "ask others".to_owned(),
            Answer::Ignore => "ignore".to_owned(),
        };
        assert_eq!(got.trim(), want, "{name} {kind}");
    }

    #[test]
    fn names_of_ours_are_answered_and_others_passed_on() {
        check("web.", RecordType::A, "NoError 10.0.1.2");
        check("WEB.", RecordType::A, "NoError 10.0.1.2");
        check("web.", RecordType::AAAA, "NoError fd00::2");
        check("tasks.web.", RecordType::AAAA, "NoError");
        let zeros = "0.".repeat(26);
        check(&format!("2.0.{zeros}0.0.d.f.ip6.arpa."), RecordType::PTR, "NoError web.1.abc.");
        check(&format!("3.0.{zeros}0.0.d.f.ip6.arpa."), RecordType::PTR, "ask others");
        check("tasks.web.", RecordType::A, "NoError 10.0.1.4 10.0.1.3");
        check("tasks.nope.", RecordType::A, "NXDomain");
        check("nope.", RecordType::A, "NXDomain");
        check("example.com.", RecordType::A, "ask others");
        check("3.1.0.10.in-addr.arpa.", RecordType::PTR, "NoError web.1.abc.");
        check("9.9.9.9.in-addr.arpa.", RecordType::PTR, "ask others");
    }

    #[test]
    fn a_long_answer_is_cut_short_over_udp_alone() {
        let message = |transport| match ask("many.", RecordType::A, transport) {
            Answer::Reply(bytes) => Message::from_vec(&bytes).unwrap(),
            other => panic!("{other:?}"),
        };
        let udp = message(Transport::Udp);
        assert!(udp.metadata.truncation && udp.answers.is_empty());
        assert_eq!(message(Transport::Tcp).answers.len(), 199);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_stumble(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            drop(answer(&bytes, &[&zone()], Transport::Udp, 0));
        }
    }
}
