//! `#[derive(Extensible)]`: bincode's `Encode` and `Decode` for types that later builds of Skep
//! may add fields to. How it looks on the wire is told in `skep_api::encoding::extensible`.

use proc_macro2::TokenStream;
use quote::{format_ident, quote};
use syn::{Attribute, Data, DeriveInput, Error, Field, Fields, Ident, Result, Type, parse_macro_input};

/// Implements `bincode::Encode` and `bincode::Decode<()>`.
///
/// Fields with names are framed, so their list may grow at its end. A field that was added after
/// the type was first released carries `#[added]`, and its type has a `Default`, which stands for
/// it in what earlier builds wrote. Fields are never removed, moved or retyped; the variants of an
/// enum are told by their place in it, and new ones come last.
#[proc_macro_derive(Extensible, attributes(added))]
pub fn derive_extensible(input: proc_macro::TokenStream) -> proc_macro::TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    expand(&input).unwrap_or_else(Error::into_compile_error).into()
}

fn expand(input: &DeriveInput) -> Result<TokenStream> {
    if !input.generics.params.is_empty() {
        return Err(Error::new_spanned(&input.generics, "types with parameters cannot be extensible"));
    }
    let name = &input.ident;
    let (encode, decode) = match &input.data {
        Data::Struct(data) => {
            let layout = Layout::of(&data.fields)?;
            let (pattern, encode, decode) = (layout.pattern(), layout.encode(), layout.decode(&quote!(Self)));
            (quote!(let Self #pattern = self; #encode), decode)
        }
        Data::Enum(data) => {
            let mut arms = Vec::new();
            let mut variants = Vec::new();
            for (index, variant) in (0u32..).zip(&data.variants) {
                let layout = Layout::of(&variant.fields)?;
                let variant = &variant.ident;
                let (pattern, encode, decode) =
                    (layout.pattern(), layout.encode(), layout.decode(&quote!(Self::#variant)));
                arms.push(quote! {
                    Self::#variant #pattern => { ::bincode::Encode::encode(&#index, encoder)?; #encode }
                });
                variants.push(quote!(#index => { #decode }));
            }
            let decode = quote! {
                match <u32 as ::bincode::Decode<()>>::decode(decoder)? {
                    #(#variants)*
                    found => Err(::skep_api::encoding::extensible::unknown_variant(::std::any::type_name::<Self>(), found)),
                }
            };
            (quote!(match self { #(#arms)* }), decode)
        }
        Data::Union(_) => return Err(Error::new_spanned(name, "a union cannot be extensible")),
    };
    Ok(quote! {
        impl ::bincode::Encode for #name {
            fn encode<E: ::bincode::enc::Encoder>(
                &self,
                encoder: &mut E,
            ) -> ::std::result::Result<(), ::bincode::error::EncodeError> {
                #encode
            }
        }
        impl ::bincode::Decode<()> for #name {
            fn decode<D: ::bincode::de::Decoder<Context = ()>>(
                decoder: &mut D,
            ) -> ::std::result::Result<Self, ::bincode::error::DecodeError> {
                #decode
            }
        }
        ::bincode::impl_borrow_decode_with_context!(#name, ());
    })
}

/// The fields of a struct or of an enum's variant.
enum Layout<'a> {
    Unit,
    /// In place, with nothing around them: these lists never grow.
    Tuple(Vec<(Ident, &'a Type)>),
    /// In a frame.
    Named(Vec<NamedField<'a>>),
}

struct NamedField<'a> {
    name: &'a Ident,
    ty: &'a Type,
    added: bool,
}

impl<'a> Layout<'a> {
    fn of(fields: &'a Fields) -> Result<Self> {
        match fields {
            Fields::Unit => Ok(Self::Unit),
            Fields::Unnamed(fields) => {
                if let Some(field) = fields.unnamed.iter().find(|field| is_added(field)) {
                    return Err(Error::new_spanned(field, "only fields with names can be added"));
                }
                let names = (0..).map(|index: usize| format_ident!("field_{index}"));
                Ok(Self::Tuple(names.zip(fields.unnamed.iter().map(|field| &field.ty)).collect()))
            }
            Fields::Named(fields) => {
                let mut named: Vec<NamedField<'a>> = Vec::new();
                for field in &fields.named {
                    let added = is_added(field);
                    if !added && named.last().is_some_and(|before| before.added) {
                        return Err(Error::new_spanned(field, "added fields come after all others"));
                    }
                    let name = field.ident.as_ref().expect("the field has a name");
                    named.push(NamedField { name, ty: &field.ty, added });
                }
                Ok(Self::Named(named))
            }
        }
    }

    /// Binds every field.
    fn pattern(&self) -> TokenStream {
        match self {
            Self::Unit => quote!(),
            Self::Tuple(fields) => {
                let names = fields.iter().map(|(name, _)| name);
                quote!((#(#names),*))
            }
            Self::Named(fields) => {
                let names = fields.iter().map(|field| field.name);
                quote!({ #(#names),* })
            }
        }
    }

    fn encode(&self) -> TokenStream {
        match self {
            Self::Unit => quote!(Ok(())),
            Self::Tuple(fields) => {
                let names = fields.iter().map(|(name, _)| name);
                quote!(#(::bincode::Encode::encode(#names, encoder)?;)* Ok(()))
            }
            Self::Named(fields) => {
                let names = fields.iter().map(|field| field.name);
                quote! {
                    ::skep_api::encoding::extensible::encode_frame(encoder, |encoder| {
                        #(::bincode::Encode::encode(#names, encoder)?;)*
                        Ok(())
                    })
                }
            }
        }
    }

    fn decode(&self, constructor: &TokenStream) -> TokenStream {
        match self {
            Self::Unit => quote!(Ok(#constructor)),
            Self::Tuple(fields) => {
                let types = fields.iter().map(|(_, ty)| ty);
                quote!(Ok(#constructor(#(<#types as ::bincode::Decode<()>>::decode(decoder)?),*)))
            }
            Self::Named(fields) => {
                let fields = fields.iter().map(|NamedField { name, ty, added }| {
                    let read = if *added { quote!(added) } else { quote!(field) };
                    quote!(#name: frame.#read::<#ty>()?)
                });
                quote! {
                    ::skep_api::encoding::extensible::decode_frame(decoder, |frame| {
                        Ok(#constructor { #(#fields),* })
                    })
                }
            }
        }
    }
}

fn is_added(field: &Field) -> bool {
    field.attrs.iter().map(Attribute::path).any(|path| path.is_ident("added"))
}

#[cfg(test)]
mod tests {
    use syn::parse_quote;

    use super::*;

    #[track_caller]
    fn refused(input: &DeriveInput) -> String {
        expand(input).expect_err("it is refused").to_string()
    }

    #[test]
    fn what_could_not_be_read_by_others_does_not_compile() {
        let between = parse_quote! { struct A { a: u8, #[added] b: u8, c: u8 } };
        assert!(refused(&between).contains("come after all others"));
        assert!(refused(&parse_quote! { struct A(#[added] u8); }).contains("only fields with names"));
        assert!(refused(&parse_quote! { enum A { B { #[added] a: u8, b: u8 } } }).contains("come after all others"));
        assert!(refused(&parse_quote! { struct A<T> { a: T } }).contains("parameters"));
        assert!(expand(&parse_quote! { struct A { a: u8, #[added] b: u8, #[added] c: u8 } }).is_ok());
    }
}
