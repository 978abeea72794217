//! Compose files as they are written: values that know where they stand.

use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;
use std::str::FromStr;

use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

/// A value of a file.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) kind: Kind,
    place: Place,
}

#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// Null, too.
    Scalar(Value),
    List(Vec<Node>),
    Map(BTreeMap<String, Node>),
}

#[derive(Clone, Debug, Default)]
struct Place {
    file: Rc<str>,
    line: u64,
}

impl Node {
    /// Reads the text of a file.
    pub(super) fn parse(file: &str, text: &str) -> anyhow::Result<Self> {
        // As in the files that there are: modes are octal with a leading zero, and `yes` is a text.
        let options = serde_saphyr::options! { legacy_octal_numbers: true, strict_booleans: true };
        let parsed = serde_saphyr::from_str_with_options::<Self>(text, options);
        let mut node = parsed.map_err(|error| anyhow::anyhow!("{file} is no YAML that can be read: {error}"))?;
        node.lies_in(&Rc::from(file));
        Ok(node)
    }

    fn lies_in(&mut self, file: &Rc<str>) {
        self.place.file = file.clone();
        match &mut self.kind {
            Kind::Scalar(_) => {}
            Kind::List(list) => list.iter_mut().for_each(|node| node.lies_in(file)),
            Kind::Map(map) => map.values_mut().for_each(|node| node.lies_in(file)),
        }
    }

    /// Another value at the same place.
    pub(super) fn with(&self, kind: Kind) -> Self {
        Self { kind, place: self.place.clone() }
    }

    pub(super) fn is_null(&self) -> bool {
        matches!(&self.kind, Kind::Scalar(Value::Null))
    }

    /// An error that names the place.
    pub(super) fn wrong(&self, path: &str, reason: impl fmt::Display) -> anyhow::Error {
        anyhow::anyhow!("{}:{}: {path}: {reason}", self.place.file, self.place.line)
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = serde_saphyr::Spanned::<Kind>::deserialize(deserializer)?;
        Ok(Self { kind: spanned.value, place: Place { line: spanned.referenced.line(), ..Place::default() } })
    }
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Kind;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }
            fn visit_unit<E>(self) -> Result<Kind, E> {
                Ok(Kind::Scalar(Value::Null))
            }
            fn visit_none<E>(self) -> Result<Kind, E> {
                Ok(Kind::Scalar(Value::Null))
            }
            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Kind, D::Error> {
                Kind::deserialize(deserializer)
            }
            fn visit_bool<E>(self, value: bool) -> Result<Kind, E> {
                Ok(Kind::Scalar(value.into()))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Kind, E> {
                Ok(Kind::Scalar(value.into()))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Kind, E> {
                Ok(Kind::Scalar(value.into()))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Kind, E> {
                Ok(Kind::Scalar(value.into()))
            }
            fn visit_str<E>(self, value: &str) -> Result<Kind, E> {
                Ok(Kind::Scalar(value.into()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Kind, A::Error> {
                let mut list = Vec::new();
                while let Some(node) = access.next_element()? {
                    list.push(node);
                }
                Ok(Kind::List(list))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Kind, A::Error> {
                let mut map = BTreeMap::new();
                while let Some((key, node)) = access.next_entry::<String, Node>()? {
                    map.insert(key, node);
                }
                Ok(Kind::Map(map))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

impl Serialize for Node {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.kind {
            Kind::Scalar(value) => value.serialize(serializer),
            Kind::List(list) => list.serialize(serializer),
            Kind::Map(map) => map.serialize(serializer),
        }
    }
}

/// A value and how one comes to it from the top.
#[derive(Clone, Debug)]
pub(super) struct Field<'a> {
    pub(super) path: String,
    pub(super) node: &'a Node,
}

impl<'a> Field<'a> {
    pub(super) fn wrong(&self, reason: impl fmt::Display) -> anyhow::Error {
        self.node.wrong(&self.path, reason)
    }

    /// Has what went wrong name the place.
    pub(super) fn at<T>(&self, result: anyhow::Result<T>) -> anyhow::Result<T> {
        result.map_err(|error| self.wrong(format_args!("{error:#}")))
    }

    fn below(&self, key: impl fmt::Display, node: &'a Node) -> Self {
        let path = if self.path.is_empty() { key.to_string() } else { format!("{}.{key}", self.path) };
        Self { path, node }
    }

    /// A scalar as it would be written.
    pub(super) fn text(&self) -> anyhow::Result<String> {
        match &self.node.kind {
            Kind::Scalar(Value::String(text)) => Ok(text.clone()),
            Kind::Scalar(Value::Null) => Ok(String::new()),
            Kind::Scalar(other) => Ok(other.to_string()),
            Kind::List(_) | Kind::Map(_) => Err(self.wrong("a text is needed here, no list and no map")),
        }
    }

    pub(super) fn number<T: FromStr>(&self) -> anyhow::Result<T> {
        let text = self.text()?;
        text.parse().map_err(|_| self.wrong(format_args!("{text:?} is no number that is possible here")))
    }

    pub(super) fn flag(&self) -> anyhow::Result<bool> {
        match self.text()?.to_lowercase().as_str() {
            "true" | "yes" | "on" | "y" => Ok(true),
            "false" | "no" | "off" | "n" => Ok(false),
            text => Err(self.wrong(format_args!("{text:?} is neither true nor false"))),
        }
    }

    /// The elements of a list.
    pub(super) fn items(&self) -> anyhow::Result<Vec<Self>> {
        match &self.node.kind {
            Kind::List(list) => {
                let items = list.iter().enumerate();
                Ok(items.map(|(index, node)| Self { path: format!("{}[{index}]", self.path), node }).collect())
            }
            Kind::Scalar(Value::Null) => Ok(Vec::new()),
            Kind::Scalar(_) | Kind::Map(_) => Err(self.wrong("a list is needed here")),
        }
    }

    /// A text, or a list of them.
    pub(super) fn texts(&self) -> anyhow::Result<Vec<String>> {
        match &self.node.kind {
            Kind::Scalar(Value::Null) => Ok(Vec::new()),
            Kind::Scalar(_) => Ok(vec![self.text()?]),
            Kind::List(_) | Kind::Map(_) => self.items()?.iter().map(Self::text).collect(),
        }
    }

    /// The entries of a map.
    pub(super) fn entries(&self) -> anyhow::Result<Vec<(&'a str, Self)>> {
        match &self.node.kind {
            Kind::Map(map) => Ok(map.iter().map(|(key, node)| (key.as_str(), self.below(key, node))).collect()),
            Kind::Scalar(Value::Null) => Ok(Vec::new()),
            Kind::Scalar(_) | Kind::List(_) => Err(self.wrong("a map is needed here")),
        }
    }

    /// A map of texts, or a list of `KEY=VALUE`; those that are named alone have no value.
    pub(super) fn pairs(&self) -> anyhow::Result<BTreeMap<String, Option<String>>> {
        if let Kind::List(_) = &self.node.kind {
            let texts = self.texts()?.into_iter();
            return Ok(texts
                .map(|text| match text.split_once('=') {
                    Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                    None => (text, None),
                })
                .collect());
        }
        let entries = self.entries()?.into_iter();
        entries
            .map(|(key, field)| {
                let value = if field.node.is_null() { None } else { Some(field.text()?) };
                Ok((key.to_owned(), value))
            })
            .collect()
    }

    /// The same where no value is an empty one.
    pub(super) fn labels(&self) -> anyhow::Result<BTreeMap<String, String>> {
        Ok(self.pairs()?.into_iter().map(|(key, value)| (key, value.unwrap_or_default())).collect())
    }

    pub(super) fn keys(&self) -> anyhow::Result<Keys<'a>> {
        Ok(Keys { of: self.clone(), left: self.entries()?.into_iter().collect() })
    }
}

/// The keys of a map, each to be taken by somebody who knows it.
pub(super) struct Keys<'a> {
    of: Field<'a>,
    left: BTreeMap<&'a str, Field<'a>>,
}

impl<'a> Keys<'a> {
    pub(super) fn take(&mut self, key: &str) -> Option<Field<'a>> {
        self.left.remove(key).filter(|field| !field.node.is_null())
    }

    pub(super) fn text(&mut self, key: &str) -> anyhow::Result<Option<String>> {
        self.take(key).map(|field| field.text()).transpose()
    }

    pub(super) fn flag(&mut self, key: &str) -> anyhow::Result<bool> {
        self.take(key).map_or(Ok(false), |field| field.flag())
    }

    pub(super) fn labels(&mut self, key: &str) -> anyhow::Result<BTreeMap<String, String>> {
        self.take(key).map_or(Ok(BTreeMap::new()), |field| field.labels())
    }

    /// Whether a key is there, whatever it says.
    pub(super) fn ignore(&mut self, key: &str) -> bool {
        self.left.remove(key).is_some()
    }

    /// Refuses what nobody has taken, but for what names itself an extension.
    pub(super) fn finish(self) -> anyhow::Result<()> {
        match self.left.into_iter().find(|(key, _)| !key.starts_with("x-")) {
            Some((key, field)) => {
                let within = if self.of.path.is_empty() { "the file" } else { &self.of.path };
                Err(field.wrong(format_args!("{key:?} is not known in {within}: correct it, or take it out")))
            }
            None => Ok(()),
        }
    }
}
