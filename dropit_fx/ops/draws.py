"""Ops that draw random numbers, by name: of functions and methods, without the last underscore."""

# A number for each element of a tensor: in the order of memory, so that its layout matters
BY_ELEMENT = frozenset(
    (
        *("dropout", "native_dropout", "alpha_dropout", "rrelu", "bernoulli", "poisson", "normal"),
        *("rand_like", "randn_like", "randint_like", "uniform", "exponential", "geometric"),
        *("cauchy", "log_normal", "random", "binomial"),
    )
)
# Or for each channel, or a few for each row: noise that is a small tensor of its own
DRAWING = BY_ELEMENT | {"feature_dropout", "feature_alpha_dropout", "multinomial"}
