"""Polynomials of the float estimate; vectorised multiply-adds are several times faster than a library's sine."""

# sin(pi/2 s) / s and cos(pi/2 s): coefficients of 1, s^2, ..., s^8. Least-squares fits on [-1, 1]; largest errors 7e-9
# and 5e-8, no more than float32 rounding.
SINE = (1.5707963197623442, -0.6459637562409781, 0.07968990721711677, -0.004674129940871685, 0.0001516658408021454)
COSINE = (0.9999999532476085, -1.2336982076549108, 0.25365070955391167, -0.02081057137626241, 0.0008581625433496387)
