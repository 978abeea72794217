//! JSON whose members' names are read in any case, as Go reads them: clients rely on it unknowingly.

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{Deserializer, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;
use serde_json::{Error, Map, Value};

/// A value whose objects give their members to a struct's fields, whatever the case of their names. A
/// member whose name is exact wins.
pub(super) struct AnyCase(pub(super) Value);

impl<'de> Deserializer<'de> for AnyCase {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Object(members) => {
                visitor.visit_map(MapDeserializer::new(members.into_iter().map(|(name, value)| (name, Self(value)))))
            }
            Value::Array(items) => visitor.visit_seq(SeqDeserializer::new(items.into_iter().map(Self))),
            other => other.deserialize_any(visitor),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let value = match self.0 {
            Value::Object(members) => Value::Object(exact(members, fields)),
            other => other,
        };
        Self(value).deserialize_any(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.0.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.0.deserialize_enum(name, variants, visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq
        tuple tuple_struct map identifier ignored_any
    }
}

impl IntoDeserializer<'_, Error> for AnyCase {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

fn exact(members: Map<String, Value>, fields: &[&str]) -> Map<String, Value> {
    let (mut named, others): (Map<_, _>, Map<_, _>) =
        members.into_iter().partition(|(name, _)| fields.contains(&name.as_str()));
    for (name, value) in others {
        if let Some(field) = fields.iter().find(|field| field.eq_ignore_ascii_case(&name)) {
            named.entry(*field).or_insert(value);
        }
    }
    named
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(rename_all = "PascalCase", default)]
    struct Outer {
        name: String,
        inner: Option<Vec<Inner>>,
        labels: BTreeMap<String, String>,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(rename_all = "PascalCase", default)]
    struct Inner {
        ratio: f32,
        count: u8,
    }

    #[test]
    fn members_are_found_in_any_case_and_names_of_a_map_stay_as_they_are() {
        let value = json!({"NAME": "n", "name": "m", "inner": [{"RATIO": 0.5, "Count": 2, "count": 3}],
            "labels": {"Name": "kept", "name": "too"}});
        let read = Outer::deserialize(AnyCase(value)).unwrap();
        assert_eq!(read.inner, Some(vec![Inner { ratio: 0.5, count: 2 }]));
        assert_eq!(read.labels, BTreeMap::from([("Name".into(), "kept".into()), ("name".into(), "too".into())]));
        assert!(Outer::deserialize(AnyCase(json!({"inner": [{"count": 256}]}))).is_err());
    }
}
