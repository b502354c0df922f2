"""Inner approximations of domains of attraction, proved in exact arithmetic."""

from catode.theory.certificates.certificate import Certificate, certify

__all__ = ["Certificate", "certify"]
