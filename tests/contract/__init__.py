"""Tests against a checkout of the real Pointcept, which POINTCEPT_ROOT names."""
